"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7 and 8), averaged over sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_aligndistil.types import LossOutput


@dataclass(frozen=True)
class KTOSettings:
    """β, nats of reward for a nat of log-ratio, and the weights λ_D and λ_U of the two kinds of response."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


def kto_loss(
    logprob_N: Tensor, reference_logprob_N: Tensor, desirable_N: Tensor, kl: float, settings: KTOSettings
) -> LossOutput:
    """Σ λ_D (1 - σ(r - z₀)) over desirable and λ_U (1 - σ(z₀ - r)) over undesirable responses; N of them count.

    r = β (log π_θ(y|x) - log π_ref(y|x)) and z₀ = max(0, β KL), a number without gradient. The paper and TRL write
    σ(β (h - z₀')) with z₀' = max(0, KL): the same.

    Reported: ``desirable_reward`` and ``undesirable_reward``, means of r over each kind, whose difference is the margin
    (there is no accuracy: responses without a partner are not in any order); ``kl_estimate``, the KL before it is cut
    at 0, nats; ``z0``.

    Args:
        logprob_N: summed response log-probs under the policy [N].
        reference_logprob_N: the same under the reference [N].
        desirable_N: the responses' labels, bool [N].
        kl: estimate of KL(π_θ ‖ π_ref) a response, nats, of the whole global batch.
    """
    z0 = max(0.0, settings.beta * kl)
    reward_N = settings.beta * (logprob_N - reference_logprob_N)
    # 1 - σ(x) is σ(-x), without its cancellation.
    loss_N = torch.where(
        desirable_N,
        settings.desirable_weight * torch.sigmoid(z0 - reward_N),
        settings.undesirable_weight * torch.sigmoid(reward_N - z0),
    )
    detached_N = reward_N.detach()
    count = torch.ones_like(detached_N).sum()
    kinds = {"desirable_reward": desirable_N, "undesirable_reward": ~desirable_N}
    sums = {name: (detached_N[kind_N].sum(), kind_N.sum().to(count.dtype)) for name, kind_N in kinds.items()}
    sums |= {name: (value * count, count) for name, value in {"kl_estimate": kl, "z0": z0}.items()}
    return LossOutput(total=loss_N.sum(), count=loss_N.numel(), sums=sums)
