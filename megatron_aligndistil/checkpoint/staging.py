"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.parallel.collectives import barrier, from_first_rank


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside ``output`` that is renamed to it at the end, or removed after an error.

    Every rank enters and leaves it; rank 0 makes and renames the folder.

    Raises:
        CheckpointError: ``output`` already holds something, or cannot be made.
    """
    staging = output.parent / f".{output.name}.partial"
    problem = None
    if dist.get_rank() == 0:
        problem = _prepare(output, staging)
    if problem := from_first_rank(problem):
        raise CheckpointError(problem)
    try:
        yield staging
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    barrier()
    if dist.get_rank() == 0:
        if output.is_dir():
            output.rmdir()
        os.replace(staging, output)
    barrier()


def _prepare(output: Path, staging: Path) -> str | None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return f"{output}: exists already; remove it or choose another output"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir(parents=True)
    except OSError as error:
        return f"{output}: cannot create: {error.strerror or error}"
    return None
