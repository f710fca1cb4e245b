"""KL(pi || pi') from one sweep: words (m, s, sum e (x - x'), m', s') with x = z - m, x' = z' - m', e = exp(x).

KL = E[x - x'] - log s + log s', all after the merger over shards.

Shapes: T tokens, C tokens of one chunk, V true vocabulary entries of this shard, R tensor-parallel ranks, K words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.kernels.head_product import HeadProduct
from megatron_aligndistil.kernels.partials import MergedSoftmax, shifted
from megatron_aligndistil.kernels.vocabulary_sweep import Merged


class KLToOther:
    """Its gradient with respect to the policy's logits is pi (x - x' - E[x - x'])."""

    words = 5

    def __init__(self, other: HeadProduct) -> None:
        self.other = other

    def partials_KC(self, logits_CV: Tensor, rows: slice) -> Tensor:
        max_C, x_CV = shifted(logits_CV)
        other_max_C, other_x_CV = shifted(self.other.logits_CV(rows))
        other_sum_C = other_x_CV.exp().sum(-1)
        exp_CV = x_CV.exp()
        weighted_C = (x_CV - other_x_CV).mul_(exp_CV).sum(-1)
        return torch.stack((max_C, exp_CV.sum(-1), weighted_C, other_max_C, other_sum_C))

    def merge(self, partials_RKT: Tensor) -> Merged:
        max_RT, sum_RT, weighted_RT, other_max_RT, other_sum_RT = partials_RKT.unbind(1)
        policy, other = MergedSoftmax.of(max_RT, sum_RT), MergedSoftmax.of(other_max_RT, other_sum_RT)
        mean_T = policy.expectation(weighted_RT + sum_RT * (policy.shift_RT - other.shift_RT))
        kl_T = mean_T - policy.sum_T.log() + other.sum_T.log()
        return Merged((kl_T,), (policy.max_T, policy.sum_T, mean_T, other.max_T))

    def logit_gradient_CV(self, logits_CV: Tensor, rows: slice, state: tuple[Tensor, ...]) -> Tensor:
        max_C, sum_C, mean_C, other_max_C = state
        x_CV = logits_CV - max_C[:, None]
        gap_CV = x_CV - (self.other.logits_CV(rows) - other_max_C[:, None])
        return gap_CV.sub_(mean_C[:, None]).mul_(x_CV.exp_().div_(sum_C[:, None]))
