"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347): actor and critic, averaged over tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_aligndistil.types import LossOutput


def ppo_policy_loss(logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, clip: float) -> LossOutput:
    """Minus the clipped surrogate, -Σ_t min(ρ_t A_t, clip(ρ_t, 1 ± clip) A_t) (its Eq. 7); the count is T tokens.

    Reported: ``ratio`` ρ, ``clipped_share`` of tokens where the clip binds (no gradient comes from them), and
    ``approximate_kl`` ⟨ρ - 1 - log ρ⟩, nats, which estimates KL(π_old ‖ π_θ) without bias and is never negative.

    Args:
        logprob_T: log π_θ of the response tokens, nats [T].
        old_logprob_T: the same of the policy that drew them [T]; ρ = exp(logprob - old_logprob).
        advantage_T: A, units of reward [T].
        clip: how far ρ may go from 1.
    """
    log_ratio_T, advantage_T = logprob_T - old_logprob_T.detach(), advantage_T.detach()
    ratio_T = log_ratio_T.exp()
    loss_T = -advantage_T * ratio_T
    clipped_T = -advantage_T * ratio_T.clamp(1 - clip, 1 + clip)
    reported = {
        "ratio": ratio_T,
        "clipped_share": clipped_T > loss_T,
        "approximate_kl": log_ratio_T.expm1() - log_ratio_T,
    }
    maxima = {"ratio_max": ratio_T.detach().max()} if ratio_T.numel() else {}
    return LossOutput(torch.maximum(loss_T, clipped_T).sum(), ratio_T.numel(), _token_sums(reported), maxima)


def value_loss(value_T: Tensor, old_value_T: Tensor, return_T: Tensor, clip: float) -> LossOutput:
    """½ Σ_t max((V_t - R_t)², (clip(V_t, V_old ± clip) - R_t)²), as in OpenAI's baselines; the count is T tokens.

    Reported: ``value``, ``return``, and ``value_clipped_share`` of tokens where the clip binds (they give no gradient).

    Args:
        value_T: the critic's V before each response token is chosen, units of reward [T].
        old_value_T: the same when the rollout was made [T].
        return_T: R, what V should be [T].
        clip: how far V may go from V_old, units of reward.
    """
    old_value_T, return_T = old_value_T.detach(), return_T.detach()
    loss_T = (value_T - return_T).square()
    clipped_T = (value_T.clamp(old_value_T - clip, old_value_T + clip) - return_T).square()
    reported = {"value": value_T, "return": return_T, "value_clipped_share": clipped_T > loss_T}
    return LossOutput(0.5 * torch.maximum(loss_T, clipped_T).sum(), value_T.numel(), _token_sums(reported))


def _token_sums(reported: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (value_T.detach().sum(), torch.tensor(float(value_T.numel()), device=value_T.device))
        for name, value_T in reported.items()
    }
