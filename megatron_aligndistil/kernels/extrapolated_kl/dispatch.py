"""The public ops. Shapes: T tokens, H a model's hidden size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_aligndistil.kernels.backends.backend import statistic_dtype
from megatron_aligndistil.kernels.backends.choice import choose
from megatron_aligndistil.kernels.checks import check_rows, check_same_columns, check_same_rows
from megatron_aligndistil.kernels.extrapolated_kl.chunked import KLToExtrapolation, KLToFoldedExtrapolation
from megatron_aligndistil.kernels.extrapolated_kl.teachers import TeacherPass
from megatron_aligndistil.kernels.extrapolated_kl.values import (
    ExtrapolatedKL,
    Extrapolation,
    Teacher,
    TeacherScalars,
    TokenStatistics,
)
from megatron_aligndistil.kernels.partials import sum_over_ranks
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.vocabulary_sweep import sweep
from megatron_aligndistil.types import VocabHead


@torch.no_grad()
def teacher_scalars(
    hidden_d_TH: Tensor,
    head_d: VocabHead,
    hidden_r_TH: Tensor,
    head_r: VocabHead,
    extrapolation: Extrapolation,
    settings: KernelSettings,
) -> TeacherScalars:
    """Normalisers, TVD, alpha and log Z* of two teachers at the same T tokens; no gradient.

    hidden_d_TH, hidden_r_TH  [T, H], whole on each tensor-parallel rank
    7 words a token cross the ranks, in three collectives a chunk.
    """
    _check_pair(hidden_d_TH, head_d, hidden_r_TH, head_r)
    operands = (hidden_d_TH, head_d.weight, hidden_r_TH, head_r.weight)
    dtype, backend = statistic_dtype(*operands), choose(settings, operands)
    products = backend.product(hidden_d_TH, head_d, dtype), backend.product(hidden_r_TH, head_r, dtype)
    return TeacherPass(backend, *products, settings=settings, group=head_d.group).scalars(extrapolation)


def extrapolated_kl(
    policy_hidden_TH: Tensor,
    policy_head: VocabHead,
    teacher: Teacher,
    settings: KernelSettings,
    statistics: bool = True,
) -> ExtrapolatedKL:
    """KL(pi_theta || softmax z*) with its gradient.

    policy_hidden_TH  [T, H], whole on each tensor-parallel rank; its gradient is this shard's part (see the package)
    teacher           of the same tokens; gets no gradient
    statistics        also ``reward_part``, from the same sweep. Without, teachers that share one fp32 head are folded
                      into one product.
    3 words a token cross the ranks in the forward pass, none in the backward pass. Gradient with respect to the
    policy's logits: pi_theta (log pi_theta - log pi* - kl), times the token's upstream weight.
    """
    check_rows(policy_hidden_TH, policy_head)
    _check_pair(teacher.hidden_d_TH, teacher.head_d, teacher.hidden_r_TH, teacher.head_r)
    check_same_rows(policy_hidden_TH, teacher.hidden_d_TH)
    check_same_columns(policy_head, teacher.head_d)
    dtype = statistic_dtype(policy_hidden_TH, policy_head.weight)
    of_teacher = (teacher.hidden_d_TH, teacher.head_d.weight, teacher.hidden_r_TH, teacher.head_r.weight)
    backend = choose(settings, (policy_hidden_TH, policy_head.weight, *of_teacher))
    folded = not statistics and _share_a_head(teacher, dtype)
    statistic = (KLToFoldedExtrapolation if folded else KLToExtrapolation)(backend, teacher, dtype)
    kl_T, reward_part_T = sweep(policy_hidden_TH, policy_head, statistic, settings, dtype)
    return ExtrapolatedKL(kl_T, reward_part_T if statistics else None)


def token_statistics(result: ExtrapolatedKL, teacher: Teacher, group: ProcessGroup | None) -> TokenStatistics:
    """Of every token, [T]; one more word a token crosses the ranks."""
    assert result.reward_part is not None, "extrapolated_kl was called without statistics"
    reward_T, alpha_T = sum_over_ranks(result.reward_part, group), teacher.scalars.alpha
    # log pi* = log pi_d + alpha D - log Z*, so KL(pi || pi_d) = KL(pi || pi*) - log Z* + alpha E[D].
    kl_to_d_T = result.kl.detach() - teacher.scalars.log_z_star + alpha_T * reward_T
    return TokenStatistics(kl_to_d_T, kl_to_d_T + reward_T, reward_T)


def summed_statistics(result: ExtrapolatedKL, teacher: Teacher, group: ProcessGroup | None) -> TokenStatistics:
    """Summed over the tokens, 0-d; two words in all cross the ranks."""
    part_T, scalars = result.reward_part, teacher.scalars
    assert part_T is not None, "extrapolated_kl was called without statistics"
    reward, weighted = sum_over_ranks(torch.stack((part_T.sum(), (scalars.alpha * part_T).sum())), group)
    kl_to_d = (result.kl.detach() - scalars.log_z_star).sum() + weighted
    return TokenStatistics(kl_to_d, kl_to_d + reward, reward)


def _share_a_head(teacher: Teacher, dtype: torch.dtype) -> bool:
    d, r = teacher.head_d, teacher.head_r
    one = d.weight.data_ptr() == r.weight.data_ptr() and d.temperature == r.temperature
    return one and d.weight.dtype == dtype


def _check_pair(hidden_d_TH: Tensor, head_d: VocabHead, hidden_r_TH: Tensor, head_r: VocabHead) -> None:
    check_rows(hidden_d_TH, head_d)
    check_rows(hidden_r_TH, head_r)
    check_same_rows(hidden_d_TH, hidden_r_TH)
    check_same_columns(head_d, head_r)
