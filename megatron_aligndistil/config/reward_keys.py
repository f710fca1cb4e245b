"""What each source of a reward needs of its section, and what it leaves unused."""

from __future__ import annotations

from megatron_aligndistil.config.analysis_schema import AnswerRewardConfig
from megatron_aligndistil.config.rollout_schema import RewardConfig

# By the reward's source.
REWARD_KEYS = {
    "model": ("path",),
    "contrastive": ("dpo_path", "reverse_dpo_path"),
    "vanilla": ("dpo_path",),
    "function": ("function",),
}
_OPTIONAL = {"vanilla": ("initial_path",)}


def reward_complaint(section: str, reward: RewardConfig | AnswerRewardConfig) -> str | None:
    """What the keys of ``section`` lack for their source, or have beyond it."""
    source = str(reward.source)
    needed = REWARD_KEYS.get(source, ())
    for key in needed:
        if getattr(reward, key) is None:
            return f"{section}.source={source}: needs {section}.{key}; add it, or choose another source"
    taken = (*needed, *_OPTIONAL.get(source, ()))
    for key in ("path", "dpo_path", "reverse_dpo_path", "initial_path", "function"):
        value = getattr(reward, key)
        if value is not None and key not in taken:
            return f"{section}.{key}={value}: unused by {section}.source={source}; remove it"
    return None
