"""The scalar policy gradients that the paper compares with (section 6.5): the contrastive reward a sentence or a token.

Both take r_t = β₀ (log π_d(y_t) - log π_r(y_t)) - β (log π_θ(y_t) - log π_d(y_t)) of the policy that drew the response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_aligndistil.algorithms.algorithm import Algorithm, Assembled, Experience, Role, Trajectory
from megatron_aligndistil.algorithms.statistics import response_logprobs
from megatron_aligndistil.config.schema import PolicyGradientConfig, PolicyGradientRunConfig
from megatron_aligndistil.losses.policy_gradient import length_weights, policy_gradient_loss
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, LossOutput

Advantage = Callable[[np.ndarray], np.ndarray]


def token_pg(config: PolicyGradientRunConfig) -> Algorithm:
    """⟨Σ_t r_t ∇log π_θ(y_t)⟩: each token answers for its own reward."""
    return _policy_gradient("token_pg", config, lambda reward_T: reward_T)


def sentence_pg(config: PolicyGradientRunConfig) -> Algorithm:
    """⟨R ∇log π_θ(y)⟩ with R = Σ_t r_t (Eq. 42): each token answers for the whole response."""
    return _policy_gradient("sentence_pg", config, lambda reward_T: np.full_like(reward_T, reward_T.sum()))


def _policy_gradient(name: str, config: PolicyGradientRunConfig, advantage: Advantage) -> Algorithm:
    settings, logprobs = config.model.pg, response_logprobs(config.model.kernel)

    def loss(policy: Projection, batch: Batch, annotation: Any) -> LossOutput:
        weight_T = length_weights(batch, settings.normalize_by_length)
        return policy_gradient_loss(logprobs(policy, batch), batch.values["advantage"], weight_T, batch.n_sequences)

    return Algorithm(
        name=name,
        kind="prompt",
        loss=loss,
        experience=Experience(
            assemble=lambda trajectories, state: assembled(trajectories, settings, advantage),
            policy={"old_logprob": logprobs},
            roles={
                "dpo_logprob": Role(settings.dpo_path, "model.pg.dpo_path", logprobs),
                "reverse_dpo_logprob": Role(settings.reverse_dpo_path, "model.pg.reverse_dpo_path", logprobs),
            },
        ),
    )


def assembled(trajectories: Sequence[Trajectory], settings: PolicyGradientConfig, advantage: Advantage) -> Assembled:
    """Advantages of a rollout."""
    rewards, kls, values = [], [], []
    for trajectory in trajectories:
        old_T, dpo_T, reverse_T = (_float64(trajectory.statistics, f"{who}_logprob") for who in _MODELS)
        rewards.append(settings.beta0 * (dpo_T - reverse_T))
        kls.append(old_T - dpo_T)
        values.append({"advantage": advantage(rewards[-1] - settings.beta * kls[-1])})
    token_reward, kl_to_dpo = (float(np.concatenate(parts).mean()) for parts in (rewards, kls))
    return Assembled(values, {"token_reward": token_reward, "kl_to_dpo": kl_to_dpo})


_MODELS = ("old", "dpo", "reverse_dpo")


def _float64(statistics: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return statistics[name].astype(np.float64)
