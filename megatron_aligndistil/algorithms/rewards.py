"""Rewards of whole responses: a reward model's, a DPO reward (paper Eq. 5, 12), or a function of the texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_aligndistil.algorithms.algorithm import Role
from megatron_aligndistil.algorithms.statistics import response_logprobs, sequence_scores
from megatron_aligndistil.config.rollout_schema import RewardConfig
from megatron_aligndistil.config.schema import PPOModelConfig
from megatron_aligndistil.rollout.reward_function import RewardFunction

Score = Callable[[Mapping[str, np.ndarray]], float]


@dataclass(frozen=True)
class Reward:
    """``score`` gives a response's reward from its statistics, which ``roles`` or ``function`` make."""

    score: Score
    roles: Mapping[str, Role] = field(default_factory=dict)
    function: RewardFunction | None = None


def reward_of(model: PPOModelConfig) -> Reward:
    """The reward that ``model.reward`` asks for."""
    settings = model.reward
    source = _SOURCES[settings.source](model)
    if settings.clip is None:
        return source
    limit, score = settings.clip, source.score
    return Reward(lambda statistics: float(np.clip(score(statistics), -limit, limit)), source.roles, source.function)


def _model(model: PPOModelConfig) -> Reward:
    role = Role(model.reward.path or "", "model.reward.path", sequence_scores, scalar=True)
    return Reward(lambda statistics: float(statistics["reward"][0]), {"reward": role})


def _contrastive(model: PPOModelConfig) -> Reward:
    settings = model.reward
    roles = _dpo_roles(model, "reverse_dpo_path", settings.reverse_dpo_path or "")
    return Reward(_log_ratio(settings), roles)


def _vanilla(model: PPOModelConfig) -> Reward:
    settings = model.reward
    roles = _dpo_roles(model, "initial_path", settings.initial_path or model.restore_from_path)
    return Reward(_log_ratio(settings), roles)


def _dpo_roles(model: PPOModelConfig, other_key: str, other_path: str) -> dict[str, Role]:
    keep = response_logprobs(model.kernel)
    return {
        "reward_dpo": Role(model.reward.dpo_path or "", "model.reward.dpo_path", keep),
        "reward_other": Role(other_path, f"model.reward.{other_key}", keep),
    }


def _log_ratio(settings: RewardConfig) -> Score:
    def score(statistics: Mapping[str, np.ndarray]) -> float:
        difference = statistics["reward_dpo"].astype(np.float64) - statistics["reward_other"]
        return settings.beta0 * float(difference.sum())

    return score


def _function(model: PPOModelConfig) -> Reward:
    function = RewardFunction.named(model.reward.function or "")
    return Reward(lambda statistics: float(statistics["score"][0]), function=function)


_SOURCES: Mapping[str, Callable[[PPOModelConfig], Reward]] = {
    "model": _model,
    "contrastive": _contrastive,
    "vanilla": _vanilla,
    "function": _function,
}
