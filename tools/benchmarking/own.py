"""This package's kernels, with the head's gradient added to an fp32 ``main_grad`` as in training."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarking.authors import Loss
from benchmarking.problem import ALPHA, EPSILON, Model, Problem
from megatron_aligndistil.kernels.extrapolated_kl import (
    Extrapolation,
    Teacher,
    extrapolated_kl,
    teacher_scalars,
)
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_kl import token_kl
from megatron_aligndistil.types import VocabHead

Plan = Literal["auto", "store", "recompute"]
EXTRAPOLATION = Extrapolation(mode="adaptive", alpha=ALPHA, epsilon=EPSILON, tvd_scale=1.0)


def head(model: Model, problem: Problem) -> VocabHead:
    """A head as the kernels take it."""
    return VocabHead(model.weight_VH, problem.vocab, problem.first_column, problem.group)


def give_main_grad(problem: Problem) -> None:
    """What Megatron-Core's DDP puts on the policy's head. Written to, so that its pages are resident."""
    weight: Any = problem.policy.weight_VH
    weight.main_grad = torch.empty_like(weight, dtype=torch.float32, requires_grad=False).zero_()


def ours(problem: Problem, plan: Plan = "auto") -> Loss:
    """The policy's step; the teachers' scalars are there already, as in training."""
    give_main_grad(problem)
    d, r = problem.d, problem.r
    teacher = _known_teacher(d, r, head(d, problem), head(r, problem))
    return lambda: _loss(problem, teacher, KernelSettings(plan=plan))


def ours_with_scalars(problem: Problem) -> Loss:
    """The teachers' scalars and the policy's step."""
    give_main_grad(problem)
    d, r = problem.d, problem.r
    return lambda: _loss(problem, _teacher(d, r, head(d, problem), head(r, problem)), KernelSettings())


def ours_reverse_kl(problem: Problem) -> Loss:
    """KL(pi_theta || pi_d) of one teacher."""
    give_main_grad(problem)
    policy, other = problem.policy, problem.d
    policy_head, other_head = head(policy, problem), head(other, problem)

    def loss() -> Tensor:
        settings = KernelSettings()
        kl_T = token_kl(policy.hidden_TH, policy_head, other.hidden_TH, other_head, settings, "to_other")
        return kl_T.sum() * problem.even_weight

    return loss


def _teacher(d: Model, r: Model, head_d: VocabHead, head_r: VocabHead) -> Teacher:
    scalars = teacher_scalars(d.hidden_TH, head_d, r.hidden_TH, head_r, EXTRAPOLATION, KernelSettings())
    return Teacher(d.hidden_TH, head_d, r.hidden_TH, head_r, scalars)


@functools.cache
def _known_teacher(d: Model, r: Model, head_d: VocabHead, head_r: VocabHead) -> Teacher:
    return _teacher(d, r, head_d, head_r)


def _loss(problem: Problem, teacher: Teacher, settings: KernelSettings) -> Tensor:
    policy = problem.policy
    divergence = extrapolated_kl(policy.hidden_TH, head(policy, problem), teacher, settings)
    return (problem.token_weight_T * divergence.kl).sum()
