"""KL divergences of two softmaxes from one sweep: words (m, s, sum f (x - x'), m', s'), x = z - m, x' = z' - m'.

KL(pi || pi') = E[x - x'] - log s + log s' with f = exp(x), and KL(pi' || pi) = -E'[x - x'] + log s - log s' with
f = exp(x'), all after the merger over shards.

Shapes: T tokens, C tokens of one chunk, V columns of a tile, N parts or ranks, K words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.kernels.backends.backend import Backend, HeadProduct
from megatron_aligndistil.kernels.partials import MergedSoftmax
from megatron_aligndistil.kernels.statistic import Merged, Statistic, Tile


class TokenKL(Statistic):
    """Gradients with respect to the policy's logits: pi (x - x' - E[x - x']) of KL(pi || pi'); pi - pi' from it."""

    local_words = words = 5
    kept = 2

    def __init__(self, backend: Backend, other: HeadProduct, from_other: bool) -> None:
        self.backend, self.others, self.from_other = backend, (other,), from_other

    def partials(self, logits: list[Tensor], tile: Tile) -> Tensor:
        return self.backend.token_kl_sums(logits[0], logits[1], self.from_other)

    def combine(self, words_NKT: Tensor) -> Tensor:
        max_NT, sum_NT, weighted_NT, other_max_NT, other_sum_NT = words_NKT.unbind(1)
        policy, other = MergedSoftmax.of(max_NT, sum_NT), MergedSoftmax.of(other_max_NT, other_sum_NT)
        weight, weight_sum_NT = (other, other_sum_NT) if self.from_other else (policy, sum_NT)
        weighted_T = weight.total(weighted_NT + weight_sum_NT * (policy.shift_NT - other.shift_NT))
        return torch.stack((policy.max_T, policy.sum_T, weighted_T, other.max_T, other.sum_T))

    def finish(self, words_KT: Tensor, own_KT: Tensor, rows: slice) -> Merged:
        max_T, sum_T, weighted_T, other_max_T, other_sum_T = words_KT
        mean_T = weighted_T / (other_sum_T if self.from_other else sum_T)
        kl_T = mean_T - sum_T.log() + other_sum_T.log()
        return Merged((-kl_T if self.from_other else kl_T,), (max_T, sum_T, mean_T, other_max_T, other_sum_T))

    def logit_gradient(
        self, logits: list[Tensor], tile: Tile, state: tuple[Tensor, ...], out_CV: Tensor, fresh: bool
    ) -> None:
        self.backend.token_kl_gradient(logits[0], logits[1], state, self.from_other, out_CV)
