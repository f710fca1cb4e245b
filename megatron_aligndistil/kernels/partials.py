"""Softmax sums of one vocabulary shard, and their merger over the shards.

A shard's softmax is kept as (maximum m, s = sum of exp(z - m), sums of exp(z - m) * value). A shard that is all padding
has m = -inf and zero sums, and weighs nothing in a merger.

Shapes: T tokens, C tokens of one chunk, V true vocabulary entries of this shard, R tensor-parallel ranks, K words a
token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def shifted(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(m_C, z - m [C, V]); m = -inf where the shard has no true column."""
    if logits_CV.shape[1] == 0:
        return logits_CV.new_full((logits_CV.shape[0],), -torch.inf), logits_CV
    max_C = logits_CV.amax(-1)
    return max_C, logits_CV - max_C[:, None]


def gather_partials(partials_KT: Tensor, group: ProcessGroup | None) -> Tensor:
    """Every rank's partials [R, K, T], by one all-gather of K words a token; no collective on one rank or no token."""
    ranks = 1 if group is None else group.size()
    if ranks == 1:
        return partials_KT[None]
    gathered_RKT = partials_KT.new_empty((ranks, *partials_KT.shape))
    if partials_KT.numel():  # T is equal over the group: all ranks skip, or none
        dist.all_gather(list(gathered_RKT.unbind(0)), partials_KT.contiguous(), group=group)
    return gathered_RKT


@dataclass(frozen=True)
class MergedSoftmax:
    """A softmax over all shards, and what brings a shard's sums to its scale.

    max_T, sum_T   of the whole vocabulary
    scale_RT       exp(m_r - max): factor of rank r's sums, 0 for an empty shard
    shift_RT       m_r - max, 0 for an empty shard: to add to values that were taken relative to m_r
    """

    max_T: Tensor
    sum_T: Tensor
    scale_RT: Tensor
    shift_RT: Tensor

    @classmethod
    def of(cls, max_RT: Tensor, sum_RT: Tensor) -> MergedSoftmax:
        """Merges the shards' (m, s)."""
        max_T = max_RT.amax(0)
        shift_RT = max_RT - max_T
        scale_RT = shift_RT.exp()
        shift_RT = shift_RT.masked_fill(max_RT == -torch.inf, 0.0)  # else 0 * (-inf) below
        return cls(max_T, (scale_RT * sum_RT).sum(0), scale_RT, shift_RT)

    @property
    def log_z_T(self) -> Tensor:
        """Logarithm of the normaliser."""
        return self.max_T + self.sum_T.log()

    def probabilities(self, logits_CV: Tensor) -> Tensor:
        """pi of this shard's logits: [C, V]."""
        return (logits_CV - self.max_T[:, None]).exp_().div_(self.sum_T[:, None])

    def expectation(self, weighted_RT: Tensor) -> Tensor:
        """E[value] from the shards' sums of exp(z - m) * value: [T]."""
        return (self.scale_RT * weighted_RT).sum(0) / self.sum_T
