"""The spawner itself: results in rank order, every rank's error, no survivors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RanksFailed, run_ranks


def _sum_of_ranks(scale_N: torch.Tensor) -> torch.Tensor:
    total_N = scale_N * dist.get_rank()
    dist.all_reduce(total_N)
    return total_N + 100 * dist.get_rank()


def _fail_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last rank's own words")
    dist.barrier()


def _die() -> None:
    if dist.get_rank() == 0:
        os._exit(17)
    dist.barrier()


def _hang_with_child(pid_file: str) -> None:
    if dist.get_rank() == 0:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(pid_file).write_text(str(child.pid))
        time.sleep(600)
    dist.barrier()


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(3, _sum_of_ranks, torch.tensor([1.0, 2.0]))
    assert [result.tolist() for result in results] == [[3.0, 6.0], [103.0, 106.0], [203.0, 206.0]]


def test_error_of_one_rank_is_reported_while_others_wait() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 of 2: .*(?s:.)*ValueError: the last rank's own words"):
        run_ranks(2, _fail_on_last)


def test_death_without_traceback_is_reported() -> None:
    with pytest.raises(RanksFailed, match="exit code 17"):
        run_ranks(2, _die)


def test_hung_ranks_are_killed_with_their_children_and_say_where(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(RanksFailed, match=r"(?s)no end after 4 s.*_hang_with_child"):
        run_ranks(2, _hang_with_child, str(pid_file), timeout_seconds=4)
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    for _ in range(50):  # reaping by init is not immediate
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the hung rank's child is still alive")
