"""Softmax sums of a part of the vocabulary, and their merger over parts: tiles, threads or tensor-parallel ranks.

A part's softmax is kept as (maximum m, s = sum of exp(z - m), sums of exp(z - m) * value). A part without a true
column has m = -inf and zero sums, and weighs nothing in a merger.

Shapes: T tokens, N parts, R tensor-parallel ranks, K words a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_partials(partials_KT: Tensor, group: ProcessGroup | None) -> Tensor:
    """Every rank's partials [R, K, T], by one all-gather of K words a token; no collective on one rank or no token."""
    ranks = 1 if group is None else group.size()
    if ranks == 1:
        return partials_KT[None]
    gathered_RKT = partials_KT.new_empty((ranks, *partials_KT.shape))
    if partials_KT.numel():  # T is equal over the group: all ranks skip, or none
        dist.all_gather(list(gathered_RKT.unbind(0)), partials_KT.contiguous(), group=group)
    return gathered_RKT


def sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The ranks' values added up, each rank's by one collective; no gradient flows through it."""
    return gather_partials(values.reshape(1, -1), group).sum(0).view_as(values)


@dataclass(frozen=True)
class MergedSoftmax:
    """A softmax over all parts, and what brings a part's sums to its scale.

    max_T, sum_T  of all parts together
    scale_NT      exp(m_n - max): factor of part n's sums, 0 for an empty one
    shift_NT      m_n - max, 0 for an empty part: to add to values that were taken relative to m_n
    """

    max_T: Tensor
    sum_T: Tensor
    scale_NT: Tensor
    shift_NT: Tensor

    @classmethod
    def of(cls, max_NT: Tensor, sum_NT: Tensor) -> MergedSoftmax:
        """Merges the parts' (m, s)."""
        max_T = max_NT.amax(0)
        empty_NT = max_NT == -torch.inf
        shift_NT = (max_NT - max_T).masked_fill(empty_NT, 0.0)  # also where all parts are empty: no -inf - -inf
        scale_NT = shift_NT.exp().masked_fill(empty_NT, 0.0)
        return cls(max_T, (scale_NT * sum_NT).sum(0), scale_NT, shift_NT)

    def total(self, weighted_NT: Tensor) -> Tensor:
        """sum exp(z - max) * value from the parts' sums of exp(z - m) * value: [T]."""
        return (self.scale_NT * weighted_NT).sum(0)


def own_share(max_T: Tensor, sum_T: Tensor, own_max_T: Tensor, own_weighted_T: Tensor) -> Tensor:
    """This shard's part of E[value]: the shards' parts add up to the expectation. [T]"""
    scale_T = (own_max_T - max_T).exp().masked_fill(own_max_T == -torch.inf, 0.0)
    return scale_T * own_weighted_T / sum_T
