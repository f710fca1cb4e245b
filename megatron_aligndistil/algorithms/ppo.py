"""PPO, and RTO, which adds the token-level DPO reward (paper Eq. 6) to its rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_aligndistil.algorithms.algorithm import Algorithm, Assembled, Critic, Experience, Role, Trajectory
from megatron_aligndistil.algorithms.rewards import Reward, reward_of
from megatron_aligndistil.algorithms.statistics import response_logprobs, token_values
from megatron_aligndistil.config.schema import PPOConfig, PPOModelConfig, PPORunConfig, RTORunConfig
from megatron_aligndistil.losses.advantages import adapted_kl_coef, gae, token_rewards, whitened
from megatron_aligndistil.losses.ppo import ppo_policy_loss, value_loss
from megatron_aligndistil.models.heads import Projection, ScalarProjection
from megatron_aligndistil.types import Batch, LossOutput

Bonus = Callable[[Mapping[str, np.ndarray]], np.ndarray | None]


def ppo(config: PPORunConfig) -> Algorithm:
    """Actor and critic on the policy's own responses; the reward is ``model.reward``'s, at the last token."""
    return _ppo("ppo", config.model, lambda statistics: None, {})


def rto(config: RTORunConfig) -> Algorithm:
    """PPO whose token rewards have β₁ (log π_d - log π_ref) as well; β₂ is PPO's ``kl_coef``."""
    settings = config.model.rto
    dpo = Role(settings.dpo_path, "model.rto.dpo_path", response_logprobs(config.model.kernel))

    def bonus(statistics: Mapping[str, np.ndarray]) -> np.ndarray:
        return settings.beta1 * (statistics["dpo_logprob"].astype(np.float64) - statistics["reference_logprob"])

    return _ppo("rto", config.model, bonus, {"dpo_logprob": dpo})


def _ppo(name: str, model: PPOModelConfig, bonus: Bonus, roles: Mapping[str, Role]) -> Algorithm:
    settings, reward, logprobs = model.ppo, reward_of(model), response_logprobs(model.kernel)
    reference = Role(settings.reference_path or model.restore_from_path, "model.ppo.reference_path", logprobs)

    def loss(policy: Projection, batch: Batch, annotation: Any) -> LossOutput:
        values = batch.values
        return ppo_policy_loss(logprobs(policy, batch), values["old_logprob"], values["advantage"], settings.clip)

    def critic_loss(critic: ScalarProjection, batch: Batch, annotation: Any) -> LossOutput:
        values = batch.values
        return value_loss(token_values(critic, batch), values["old_value"], values["return"], settings.value_clip)

    critic_path = settings.critic.path or model.reward.path or model.restore_from_path
    return Algorithm(
        name=name,
        kind="prompt",
        loss=loss,
        experience=Experience(
            assemble=lambda trajectories, state: assembled(trajectories, state, settings, reward, bonus),
            policy={"old_logprob": logprobs},
            critic={"old_value": token_values},
            roles={"reference_logprob": reference, **reward.roles, **roles},
            function=reward.function,
            state={"kl_coef": settings.kl_coef},
        ),
        critic=Critic(critic_path, "model.ppo.critic.path", settings.critic.optim, critic_loss),
    )


def assembled(
    trajectories: Sequence[Trajectory], state: Mapping[str, float], settings: PPOConfig, reward: Reward, bonus: Bonus
) -> Assembled:
    """Token rewards, advantages and returns of a rollout."""
    kl_coef = state["kl_coef"]
    scores, kls, advantages, returns = [], [], [], []
    for trajectory in trajectories:
        statistics = trajectory.statistics
        old_T = statistics["old_logprob"].astype(np.float64)
        kls.append(old_T - statistics["reference_logprob"])
        scores.append(reward.score(statistics))
        rewards_T = token_rewards(scores[-1], bonus(statistics), kls[-1], kl_coef)
        values_T = statistics["old_value"].astype(np.float64)
        advantages_T, returns_T = gae(rewards_T, values_T, settings.discount, settings.gae_lambda)
        advantages.append(advantages_T)
        returns.append(returns_T)
    metrics = {
        "reward": float(np.mean(scores)),
        "reward_std": float(np.std(scores)),
        "kl_to_reference": float(np.concatenate(kls).mean()),
        "kl_coef": kl_coef,
        "advantage": float(np.concatenate(advantages).mean()),
        "return": float(np.concatenate(returns).mean()),
        "value": float(np.concatenate([t.statistics["old_value"] for t in trajectories]).mean()),
    }
    if settings.whiten_advantages:
        advantages = whitened(advantages)
    if settings.kl_target is not None:
        kl_coef = adapted_kl_coef(
            kl_coef, metrics["kl_to_reference"], settings.kl_target, len(trajectories), settings.kl_horizon
        )
    values = [
        {
            "old_logprob": trajectory.statistics["old_logprob"],
            "old_value": trajectory.statistics["old_value"],
            "advantage": advantages_T,
            "return": returns_T,
        }
        for trajectory, advantages_T, returns_T in zip(trajectories, advantages, returns, strict=True)
    ]
    return Assembled(values, metrics, {"kl_coef": kl_coef})
