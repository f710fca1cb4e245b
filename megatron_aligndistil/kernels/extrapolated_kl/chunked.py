"""The KL to the extrapolation of two teachers, over tiles of the vocabulary.

The target is normalised first: t = log pi_d + alpha D with D = log pi_d - log pi_r, log pi* = t - log Z*. ``log Z*`` is
taken over the very t of the policy's step, so that the rounding of log Z_d and log Z_r, times alpha, cancels in the KL.

Shapes: T tokens, C tokens of one chunk, V columns of a tile, N parts or ranks, K words.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_aligndistil.kernels.backends.backend import Backend, TargetScalars
from megatron_aligndistil.kernels.extrapolated_kl.values import Teacher
from megatron_aligndistil.kernels.partials import MergedSoftmax, own_share
from megatron_aligndistil.kernels.statistic import Merged, Statistic, Tile


class KLToExtrapolation(Statistic):
    """KL(pi || pi*) from the words (m, s, sum e w) with x = z - m, e = exp(x), w = x - t.

    KL = E[w] + log Z* - log s, and its gradient with respect to z is pi (w - E[w]). A fourth word, sum e D, stays on
    its rank: this shard's part of E[D].
    """

    local_words, words = 4, 3

    def __init__(self, backend: Backend, teacher: Teacher, dtype: torch.dtype) -> None:
        scalars = teacher.scalars
        self.backend, self.kept = backend, backend.kept_of_extrapolation
        self.others = (
            backend.product(teacher.hidden_d_TH, teacher.head_d, dtype),
            backend.product(teacher.hidden_r_TH, teacher.head_r, dtype),
        )
        self.scalars = TargetScalars(scalars.log_z_d.to(dtype), scalars.log_z_r.to(dtype), scalars.alpha.to(dtype))
        self.log_z_star_T = scalars.log_z_star.to(dtype)

    def _scalars(self, tile: Tile) -> TargetScalars:
        of_T = self.scalars
        return TargetScalars(of_T.log_z_d[tile.rows], of_T.log_z_r[tile.rows], of_T.alpha[tile.rows])

    def partials(self, logits: list[Tensor], tile: Tile) -> Tensor:
        return self.backend.extrapolated_sums(logits[0], logits[1], logits[2], self._scalars(tile))

    def combine(self, words_NKT: Tensor) -> Tensor:
        max_NT, sum_NT, weighted_NT, *rest = words_NKT.unbind(1)
        softmax = MergedSoftmax.of(max_NT, sum_NT)
        weighted_T = softmax.total(weighted_NT + sum_NT * softmax.shift_NT)
        return torch.stack((softmax.max_T, softmax.sum_T, weighted_T, *(softmax.total(gap_NT) for gap_NT in rest)))

    def finish(self, words_KT: Tensor, own_KT: Tensor, rows: slice) -> Merged:
        max_T, sum_T, weighted_T = words_KT
        mean_T = weighted_T / sum_T
        kl_T = mean_T + self.log_z_star_T[rows] - sum_T.log()
        return Merged((kl_T, own_share(max_T, sum_T, own_KT[0], own_KT[3])), (max_T, sum_T, mean_T))

    def logit_gradient(
        self, logits: list[Tensor], tile: Tile, state: tuple[Tensor, ...], out_CV: Tensor, fresh: bool
    ) -> None:
        self.backend.extrapolated_gradient(logits, self._scalars(tile), state, out_CV)


class KLToFoldedExtrapolation(KLToExtrapolation):
    """The same where both teachers have one head W: z* = W (h_d + alpha (h_d - h_r)) is one product instead of two.

    Folded in the statistics' precision, so for fp32 heads; a bf16 head would need the fold in a high and a low part,
    two products again. D is not made, hence no statistics of it.
    """

    def __init__(self, backend: Backend, teacher: Teacher, dtype: torch.dtype) -> None:
        super().__init__(backend, teacher, dtype)
        alpha_T = self.scalars.alpha
        hidden_d_TH, hidden_r_TH = teacher.hidden_d_TH.to(dtype), teacher.hidden_r_TH.to(dtype)
        folded_TH = torch.addcmul(hidden_d_TH, alpha_T[:, None], hidden_d_TH - hidden_r_TH)
        self.others = (backend.product(folded_TH, teacher.head_d, dtype),)
        log_z_T = self.scalars.log_z_d + alpha_T * (self.scalars.log_z_d - self.scalars.log_z_r)
        self.scalars = replace(self.scalars, log_z_d=log_z_T)
        self.kept = 2

    def partials(self, logits: list[Tensor], tile: Tile) -> Tensor:
        self._normalise(logits, tile)
        words_NKC = self.backend.token_kl_sums(logits[0], logits[1], from_other=False)
        # token_kl takes z' from its maximum m': back to t, for the same words as without folding.
        max_NC, sum_NC, weighted_NC, other_max_NC, _ = words_NKC.unbind(1)
        finite_NC = other_max_NC.masked_fill(other_max_NC == -torch.inf, 0.0)
        return torch.stack((max_NC, sum_NC, weighted_NC - sum_NC * finite_NC, torch.zeros_like(sum_NC)), 1)

    def logit_gradient(
        self, logits: list[Tensor], tile: Tile, state: tuple[Tensor, ...], out_CV: Tensor, fresh: bool
    ) -> None:
        if fresh:
            self._normalise(logits, tile)
        max_C, sum_C, mean_C = state
        zero_C = torch.zeros_like(max_C)
        self.backend.token_kl_gradient(
            logits[0], logits[1], (max_C, sum_C, mean_C, zero_C, zero_C), from_other=False, out_CV=out_CV
        )

    def _normalise(self, logits: list[Tensor], tile: Tile) -> None:
        logits[1].sub_(self.scalars.log_z_d[tile.rows, None])
