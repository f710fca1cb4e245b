"""A rank that ends as its argument says, under the launcher that test_launching starts."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.launch import failures, torchrun

RANKS = 2


def two_ranks() -> RunConfig:
    config = RunConfig(algorithm="dpo")
    config.trainer.devices = RANKS
    return config


def end(how: str, folder: Path, rank: int) -> None:
    (folder / f"started-{rank}").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
    if how == "same error everywhere":
        raise DataError("pairs.jsonl:3: not\n JSON")
    if how == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("killed", "waits"):
        time.sleep(60)
    if how in ("bug in a collective", "error in a collective"):
        import torch
        from torch import distributed

        distributed.init_process_group("gloo")
        if rank == 1:
            try:
                raise DataError("rank 1's data") if "error" in how else ZeroDivisionError("rank 1's bug")
            finally:
                distributed.destroy_process_group()
                time.sleep(0.3)  # its peer's connection error comes first
        distributed.all_reduce(torch.ones(1))


def main() -> int:
    how, folder = sys.argv[1], Path(sys.argv[2])
    placement = torchrun.placement_from(os.environ)
    assert placement is not None
    try:
        with torchrun.entered(placement, two_ranks()):
            end(how, folder, placement.rank)
    except (Exception, KeyboardInterrupt) as error:
        return failures.report(error)
    return 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(main())
    sys.exit(torchrun.launch(["-m", "tests.unit.launch.rank", *sys.argv[1:]], two_ranks()))
