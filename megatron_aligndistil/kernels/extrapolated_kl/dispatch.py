"""The public ops; the chunked form runs on every device. Shapes: T tokens, H a model's hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.kernels.checks import check_rows, check_same_columns, check_same_rows
from megatron_aligndistil.kernels.extrapolated_kl.chunked import KLToExtrapolation, TeacherLogits, chunk_scalars
from megatron_aligndistil.kernels.extrapolated_kl.values import (
    ExtrapolatedKL,
    Extrapolation,
    Teacher,
    TeacherScalars,
)
from megatron_aligndistil.kernels.head_product import statistic_dtype
from megatron_aligndistil.kernels.vocabulary_sweep import chunks, sweep
from megatron_aligndistil.types import VocabHead


@torch.no_grad()
def teacher_scalars(
    hidden_d_TH: Tensor,
    head_d: VocabHead,
    hidden_r_TH: Tensor,
    head_r: VocabHead,
    extrapolation: Extrapolation,
    chunk_tokens: int,
) -> TeacherScalars:
    """Normalisers, TVD, alpha and log Z* of two teachers at the same T tokens; no gradient.

    hidden_d_TH, hidden_r_TH  [T, H], whole on each tensor-parallel rank
    chunk_tokens              tokens whose logits exist at once
    7 words a token in three collectives: normalisers, then TVD (which needs them), then log Z* (which needs alpha).
    They are entered for every chunk, not once a call, so that the logits are computed once instead of three times.
    """
    _check_pair(hidden_d_TH, head_d, hidden_r_TH, head_r, chunk_tokens)
    dtype = statistic_dtype(hidden_d_TH, head_d.weight, hidden_r_TH, head_r.weight)
    teachers = TeacherLogits(hidden_d_TH, head_d, hidden_r_TH, head_r, dtype)
    scalars_KT = hidden_d_TH.new_empty((5, hidden_d_TH.shape[0]), dtype=dtype)
    for rows in chunks(hidden_d_TH.shape[0], chunk_tokens):
        scalars_KT[:, rows] = chunk_scalars(teachers, extrapolation, rows, head_d.group)
    return TeacherScalars(*scalars_KT.unbind(0))


def extrapolated_kl(
    policy_hidden_TH: Tensor, policy_head: VocabHead, teacher: Teacher, chunk_tokens: int
) -> ExtrapolatedKL:
    """KL(pi_theta || softmax z*) with its gradient, and the detached statistics of the same sweep.

    policy_hidden_TH  [T, H], whole on each tensor-parallel rank; its gradient is this shard's part (see the package)
    teacher           of the same tokens; gets no gradient
    chunk_tokens      tokens whose logits exist at once
    One collective of 4 words a token forward (3 for the loss, 1 for the statistics), none backward. Gradient
    with respect to the policy's logits: pi_theta (log pi_theta - log pi* - kl), times the token's upstream weight.
    """
    check_rows(policy_hidden_TH, policy_head, chunk_tokens)
    _check_pair(teacher.hidden_d_TH, teacher.head_d, teacher.hidden_r_TH, teacher.head_r, chunk_tokens)
    check_same_rows(policy_hidden_TH, teacher.hidden_d_TH)
    check_same_columns(policy_head, teacher.head_d)
    dtype = statistic_dtype(policy_hidden_TH, policy_head.weight)
    statistic = KLToExtrapolation(teacher, dtype)
    return ExtrapolatedKL(*sweep(policy_hidden_TH, policy_head, statistic, chunk_tokens))


def _check_pair(
    hidden_d_TH: Tensor, head_d: VocabHead, hidden_r_TH: Tensor, head_r: VocabHead, chunk_tokens: int
) -> None:
    check_rows(hidden_d_TH, head_d, chunk_tokens)
    check_rows(hidden_r_TH, head_r, chunk_tokens)
    check_same_rows(hidden_d_TH, hidden_r_TH)
    check_same_columns(head_d, head_r)
