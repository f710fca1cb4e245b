"""Context parallelism: positions of a row spread over ranks, in the order that balances causal attention.

A row is cut into 2·CP chunks and rank r holds chunks r and 2·CP - 1 - r, as Transformer Engine expects. The loss is
computed on whole rows: the last stage gathers its hidden states. Every context rank then computes the same sums and
counts, so gradients, which are summed over context ranks, and counts both grow CP-fold, and their quotient stays.

Shapes: S positions of a whole row, L = S / CP positions of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.parallel import groups
from megatron_aligndistil.parallel.groups import Axis


def own_positions(length: int, axis: Axis, device: torch.device) -> Tensor:
    """The positions [L] of a row of ``length`` that this rank holds."""
    chunks = torch.arange(length, device=device).chunk(2 * axis.size)
    return torch.cat([chunks[axis.rank], chunks[2 * axis.size - 1 - axis.rank]])


def own_columns(values_BS: Tensor) -> Tensor:
    """This rank's part of values of whole rows: [B, L]."""
    axis = groups.context()
    return values_BS if axis.size == 1 else values_BS[:, own_positions(values_BS.shape[1], axis, values_BS.device)]


def gather_positions(values: Tensor) -> Tensor:
    """Whole rows from every rank's part, along the first dimension: [L, ...] → [S, ...], in order.

    Backward, the parts' gradients of all ranks are summed and handed to the rank that holds the part.
    """
    axis = groups.context()
    return values if axis.size == 1 else _Gather.apply(values, axis)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        parts = [torch.empty_like(part) for _ in range(axis.size)]
        dist.all_gather(parts, part.contiguous(), group=axis.group)
        whole = part.new_empty((part.shape[0] * axis.size, *part.shape[1:]))
        for rank, values in enumerate(parts):
            whole[_positions_of(rank, axis, whole)] = values
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        axis, whole = ctx.axis, gradients[0].contiguous().clone()
        dist.all_reduce(whole, group=axis.group)
        return whole[_positions_of(axis.rank, axis, whole)], None


def _positions_of(rank: int, axis: Axis, whole: Tensor) -> Tensor:
    return own_positions(whole.shape[0], Axis(axis.group, rank, axis.size), whole.device)
