"""The teachers' scalars and the KL to the extrapolation, over the vocabulary shards.

The target is normalised first: t = log pi_d + alpha D with D = log pi_d - log pi_r, log pi* = t - log Z*. (Raw
z_d + alpha (z_d - z_r) carries the arbitrary shift alpha (log Z_d - log Z_r).) ``log Z*`` is taken over the very t of
the policy's step, so that the rounding of log Z_d and log Z_r, times alpha, cancels in the KL.

Shapes: T tokens, C tokens of one chunk, V true vocabulary entries of this shard, R tensor-parallel ranks, K words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_aligndistil.kernels.extrapolated_kl.values import Extrapolation, Teacher
from megatron_aligndistil.kernels.head_product import HeadProduct
from megatron_aligndistil.kernels.partials import MergedSoftmax, gather_partials, shifted
from megatron_aligndistil.kernels.vocabulary_sweep import Merged
from megatron_aligndistil.types import VocabHead


class TeacherLogits:
    """Both teachers' logits of a chunk."""

    def __init__(
        self, hidden_d_TH: Tensor, head_d: VocabHead, hidden_r_TH: Tensor, head_r: VocabHead, dtype: torch.dtype
    ) -> None:
        self.d, self.r = HeadProduct(hidden_d_TH, head_d, dtype), HeadProduct(hidden_r_TH, head_r, dtype)

    def logits_CV(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(z_d, z_r)."""
        return self.d.logits_CV(rows), self.r.logits_CV(rows)


def target_and_gap(logits_d_CV: Tensor, logits_r_CV: Tensor, scalars: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(t, D) from the logits, which are overwritten, and the chunk's (log Z_d, log Z_r, alpha)."""
    log_z_d_C1, log_z_r_C1, alpha_C1 = (values_C[:, None] for values_C in scalars)
    logprob_d_CV = logits_d_CV.sub_(log_z_d_C1)
    gap_CV = torch.sub(logprob_d_CV, logits_r_CV.sub_(log_z_r_C1), out=logits_r_CV)
    return torch.addcmul(logprob_d_CV, alpha_C1, gap_CV), gap_CV


def chunk_scalars(
    teachers: TeacherLogits, extrapolation: Extrapolation, rows: slice, group: ProcessGroup | None
) -> Tensor:
    """(log Z_d, log Z_r, TVD, alpha, log Z*) of a chunk: [5, C]."""
    logits_d_CV, logits_r_CV = teachers.logits_CV(rows)
    sums_KC = torch.stack((*_softmax_sums(logits_d_CV), *_softmax_sums(logits_r_CV)))
    max_d_RC, sum_d_RC, max_r_RC, sum_r_RC = gather_partials(sums_KC, group).unbind(1)
    softmax_d, softmax_r = MergedSoftmax.of(max_d_RC, sum_d_RC), MergedSoftmax.of(max_r_RC, sum_r_RC)

    difference_CV = softmax_d.probabilities(logits_d_CV).sub_(softmax_r.probabilities(logits_r_CV))
    tvd_part_C = difference_CV.abs_().sum(-1).mul_(0.5)
    tvd_C = gather_partials(tvd_part_C[None], group).sum(0)[0]

    alpha_C = extrapolation.alpha_of(tvd_C)
    log_z_d_C, log_z_r_C = softmax_d.log_z_T, softmax_r.log_z_T
    target_CV, _ = target_and_gap(logits_d_CV, logits_r_CV, (log_z_d_C, log_z_r_C, alpha_C))
    max_RC, sum_RC = gather_partials(torch.stack(_softmax_sums(target_CV)), group).unbind(1)
    log_z_star_C = MergedSoftmax.of(max_RC, sum_RC).log_z_T
    return torch.stack((log_z_d_C, log_z_r_C, tvd_C, alpha_C, log_z_star_C))


def _softmax_sums(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    max_C, shifted_CV = shifted(logits_CV)
    return max_C, shifted_CV.exp().sum(-1)


class KLToExtrapolation:
    """KL(pi || pi*) from the words (m, s, sum e w, sum e D) with x = z - m, e = exp(x), w = x - t.

    KL = E[w] + log Z* - log s, and its gradient with respect to z is pi (w - E[w]). E[D] is for the statistics alone:
    KL(pi || pi_d) = E[w] + alpha E[D] - log s.
    """

    words = 4

    def __init__(self, teacher: Teacher, dtype: torch.dtype) -> None:
        self.teachers = TeacherLogits(teacher.hidden_d_TH, teacher.head_d, teacher.hidden_r_TH, teacher.head_r, dtype)
        scalars = teacher.scalars
        self.log_z_d_T, self.log_z_r_T = scalars.log_z_d.to(dtype), scalars.log_z_r.to(dtype)
        self.alpha_T, self.log_z_star_T = scalars.alpha.to(dtype), scalars.log_z_star.to(dtype)

    def _target_and_gap(self, rows: slice) -> tuple[Tensor, Tensor]:
        scalars = (self.log_z_d_T[rows], self.log_z_r_T[rows], self.alpha_T[rows])
        return target_and_gap(*self.teachers.logits_CV(rows), scalars)

    def partials_KC(self, logits_CV: Tensor, rows: slice) -> Tensor:
        max_C, x_CV = shifted(logits_CV)
        target_CV, gap_CV = self._target_and_gap(rows)
        w_CV = torch.sub(x_CV, target_CV, out=target_CV)
        exp_CV = x_CV.exp_()
        sum_C = exp_CV.sum(-1)
        return torch.stack((max_C, sum_C, w_CV.mul_(exp_CV).sum(-1), gap_CV.mul_(exp_CV).sum(-1)))

    def merge(self, partials_RKT: Tensor) -> Merged:
        max_RT, sum_RT, weighted_RT, gap_RT = partials_RKT.unbind(1)
        softmax = MergedSoftmax.of(max_RT, sum_RT)
        mean_T = softmax.expectation(weighted_RT + sum_RT * softmax.shift_RT)
        reward_T = softmax.expectation(gap_RT)
        log_sum_T = softmax.sum_T.log()
        kl_T = mean_T + self.log_z_star_T - log_sum_T
        kl_to_d_T = mean_T + self.alpha_T * reward_T - log_sum_T
        return Merged((kl_T, kl_to_d_T, kl_to_d_T + reward_T, reward_T), (softmax.max_T, softmax.sum_T, mean_T))

    def logit_gradient_CV(self, logits_CV: Tensor, rows: slice, state: tuple[Tensor, ...]) -> Tensor:
        max_C, sum_C, mean_C = state
        target_CV, _ = self._target_and_gap(rows)
        x_CV = logits_CV - max_C[:, None]
        w_CV = torch.sub(x_CV, target_CV, out=target_CV)
        return w_CV.sub_(mean_C[:, None]).mul_(x_CV.exp_().div_(sum_C[:, None]))
