"""Small reductions over the whole world, for metrics and decisions that every rank must share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

Value = TypeVar("Value")


def reduce_named(values: Mapping[str, float], operation: ReduceOp.RedOpType, device: torch.device) -> dict[str, float]:
    """Reduce named numbers over every rank; a rank that lacks a name doesn't count.

    Names may differ between ranks (only the last pipeline stage has losses), so they are exchanged first.
    """
    names = sorted(set().union(*gather_objects(sorted(values))))
    absent = 0.0 if operation is ReduceOp.SUM else -float("inf")
    packed = torch.tensor([values.get(name, absent) for name in names], dtype=torch.float64, device=device)
    if names:
        dist.all_reduce(packed, op=operation)
    return dict(zip(names, packed.tolist(), strict=True))


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
