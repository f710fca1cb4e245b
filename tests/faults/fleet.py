"""Ranks of a real run, forked from a process that has imported everything, so that starting them takes a second.

Each is what torchrun would start: ``aligndistil train`` in a process of its own, its output in a file.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_aligndistil.launch.failures import FAILURES_VARIABLE, Failure
from megatron_aligndistil.parallel.ports import free_port
from tests.distributed.harness import _context
from tests.integration.program import LIMIT_SECONDS

# What a launcher grants the others after the first rank has ended.
GRACE_SECONDS = 5.0


@dataclass
class Fleet:
    """The ranks of one start of a run."""

    folder: Path  # of their outputs and reports
    ranks: list[BaseProcess] = field(default_factory=list)

    @classmethod
    def start(
        cls, folder: Path, arguments: Sequence[str], ranks: int = 2, environment: dict[str, str] | None = None
    ) -> Fleet:
        """Start ``aligndistil train`` with ``arguments``."""
        master_port = free_port()
        context, fleet = _context(), cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for report in folder.glob("rank-*.json"):
            report.unlink()
        for rank in range(ranks):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": master_port}
            named = {name: str(value) for name, value in variables.items()}
            own = {**named, "MASTER_ADDR": "127.0.0.1", FAILURES_VARIABLE: str(folder), **(environment or {})}
            process = context.Process(target=_rank, args=(folder / f"rank_{rank}.log", list(arguments), own))
            process.start()
            fleet.ranks.append(process)
        return fleet

    def kill_one(self, rng: random.Random) -> int:
        """SIGKILL a rank, and what it started; returns which."""
        rank = rng.randrange(len(self.ranks))
        _kill(self.ranks[rank])
        return rank

    def kill(self) -> None:
        """SIGKILL all of them."""
        for rank in self.ranks:
            _kill(rank)

    def wait(self, seconds: float = LIMIT_SECONDS) -> list[int | None]:
        """Exit codes once all have ended; after the first that failed the others get GRACE_SECONDS."""
        deadline, failed = time.monotonic() + seconds, False
        while any(rank.is_alive() for rank in self.ranks):
            if not failed and any(rank.exitcode not in (None, 0) for rank in self.ranks):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                self.kill()
                assert failed, f"no end after {seconds} s:\n{self.errors()}"
            time.sleep(0.01)
        return [rank.exitcode for rank in self.ranks]

    def errors(self) -> str:
        """What the ranks have printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank_*.log")))

    def error_line(self) -> str:
        """The one line that a launcher would print."""
        failures = [Failure(**json.loads(path.read_text())) for path in self.folder.glob("rank-*.json")]
        assert failures, self.errors()
        first = min(failures, key=lambda failure: failure.explains_others)
        assert first.kind == "user error" and "\n" not in first.text, first.text
        return first.text


def wait_until(condition: Callable[[], bool], fleet: Fleet) -> None:
    """Until ``condition`` holds or a rank has ended."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition() and all(rank.is_alive() for rank in fleet.ranks):
        assert time.monotonic() < deadline, fleet.errors()
        time.sleep(0.005)


def finished(folder: Path, arguments: Sequence[str], ranks: int = 2) -> Fleet:
    """A run to its end, which must be a good one."""
    fleet = Fleet.start(folder, arguments, ranks)
    assert fleet.wait() == [0] * ranks, fleet.errors()
    return fleet


def _rank(log: Path, arguments: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.environ.update(environment, LOCAL_WORLD_SIZE=environment["WORLD_SIZE"])
    import torch

    from megatron_aligndistil.launch.cli import main

    torch.set_num_threads(1)
    sys.exit(main(["train", *arguments]))


def _kill(rank: BaseProcess) -> None:
    try:
        os.killpg(rank.pid or 0, signal.SIGKILL)
    except ProcessLookupError:  # ended, or not yet the leader of its group
        rank.kill()
    rank.join()
