"""Checkpoints are compared with their manifests before they are used; a damaged one is named, or passed over.

Every rank calls these, and all come to the same answer.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch.distributed as dist

from megatron_aligndistil.checkpoint.locate import complete_checkpoints, kind_of, model_path, saved_adapter
from megatron_aligndistil.checkpoint.manifest import damage, read_manifest
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.parallel import collectives

logger = logging.getLogger(__name__)

_KEY = "exp_manager.checkpoint_callback_params"
DAMAGED = "damaged_"  # what the name of a checkpoint that was passed over begins with from then on


def verify_model(path: str | Path) -> None:
    """Read the checkpoint at ``path`` through, and an adapter's base; models in other forms have no manifest.

    Raises:
        CheckpointError: a file is damaged.
    """
    found = model_path(path)
    if saved := saved_adapter(found):
        verify_model(saved.base)
    if kind_of(found) == "megatron" and (complaint := _complaint(found.resolve())):
        earlier = [other for other in complete_checkpoints(found.parent.parent) if other.name < found.name]
        remedy = f"take {earlier[-1]}" if earlier else "restore it from a copy"
        raise CheckpointError(f"{complaint}; {remedy}, or read it all the same with {_KEY}.verify_on_load=false")


def newest_sound(complete: Sequence[Path], when_damaged: str) -> Path:
    """The last of ``complete``; damaged ones are set aside where ``when_damaged`` is "previous".

    Raises:
        CheckpointError: the last is damaged ("stop"), or all are.
    """
    for index, checkpoint in reversed(list(enumerate(complete))):
        complaint = _complaint(checkpoint.resolve())
        if complaint is None:
            return checkpoint
        if when_damaged == "stop":
            previous = f"; {_KEY}.when_damaged=previous goes on from {complete[index - 1].name}" if index else ""
            raise CheckpointError(f"{complaint}; the run cannot go on from it{previous}")
        aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
        logger.warning("%s; set aside as %s, looking at the one before", complaint, aside.name)
        if dist.get_rank() == 0:
            os.replace(checkpoint, aside)
    raise CheckpointError(f"{complete[0].parent}: every checkpoint in there is damaged; start another run")


@cache  # a policy and its reference may be one
def _complaint(checkpoint: Path) -> str | None:
    start, ranks = time.perf_counter(), dist.get_world_size()
    found = collectives.gather_objects(damage(checkpoint, dist.get_rank(), ranks))
    complaint = next((complaint for complaint in found if complaint is not None), None)
    if complaint is None:
        size = sum(record.bytes for record in read_manifest(checkpoint).values()) / 2**30
        logger.info("%s: %.2f GiB verified in %.2f s", checkpoint, size, time.perf_counter() - start)
    return complaint
