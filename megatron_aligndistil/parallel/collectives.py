"""Small exchanges over the whole world, for decisions that every rank must share."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def gather_objects(value: Value) -> list[Value]:
    """``value`` of every rank, in rank order, on every rank."""
    gathered: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_first_rank(value: Value) -> Value:
    """Rank 0's ``value`` on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()
