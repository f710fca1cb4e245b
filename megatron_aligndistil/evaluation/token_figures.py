"""What AlignDistil makes of every response token (paper Eq. 12, 16, 17), from sharded models; no logits are gathered.

Shapes: T response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import RoleOutput
from megatron_aligndistil.evaluation.passes import Compute
from megatron_aligndistil.kernels.extrapolated_kl import (
    Extrapolation,
    Teacher,
    extrapolated_kl,
    teacher_scalars,
    token_statistics,
)
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_kl import token_kl
from megatron_aligndistil.kernels.token_logprob import token_logprob
from megatron_aligndistil.types import Batch

POLICY, DPO, REVERSE = "policy", "dpo", "reverse_dpo"
FIGURES = ("alpha", "tvd", "reward", "kl_to_teacher", "kl_to_dpo")


def token_figures(extrapolation: Extrapolation, beta0: float, kernel: KernelSettings) -> Compute:
    """The ``FIGURES`` of each token, [T], from the hidden states that "dpo", "reverse_dpo" and maybe "policy" kept.

    alpha          α_t (Eq. 16)
    tvd            TVD_t times ``extrapolation.tvd_scale``
    reward         β₀ log π_d(y_t)/π_r(y_t), nats times β₀
    kl_to_teacher  KL(π ‖ π*_t) and kl_to_dpo KL(π ‖ π_d), nats, of the policy where there is one
    """

    @torch.no_grad()
    def compute(batch: Batch, outputs: Mapping[str, RoleOutput]) -> Mapping[str, Tensor]:
        d, r = outputs[DPO], outputs[REVERSE]
        scalars = teacher_scalars(d.kept, d.head, r.kept, r.head, extrapolation, kernel)
        of_d, of_r = (token_logprob(own.kept, own.head, batch.response_labels, kernel) for own in (d, r))
        figures = {"alpha": scalars.alpha, "tvd": scalars.tvd, "reward": beta0 * (of_d - of_r)}
        if POLICY in outputs:
            p, teacher = outputs[POLICY], Teacher(d.kept, d.head, r.kept, r.head, scalars)
            divergence = extrapolated_kl(p.kept, p.head, teacher, kernel)
            figures["kl_to_teacher"] = divergence.kl
            figures["kl_to_dpo"] = token_statistics(divergence, teacher, p.head.group).kl_to_d
        return figures

    return compute


def token_divergence(first: str, second: str, kernel: KernelSettings) -> Compute:
    """KL(first ‖ second) at each response token in nats, [T], from the hidden states that both kept."""

    @torch.no_grad()
    def compute(batch: Batch, outputs: Mapping[str, RoleOutput]) -> Mapping[str, Tensor]:
        own, other = outputs[first], outputs[second]
        return {"kl": token_kl(own.kept, own.head, other.kept, other.head, kernel)}

    return compute
