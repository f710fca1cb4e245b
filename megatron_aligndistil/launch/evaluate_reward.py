"""``aligndistil evaluate reward``: the mean reward of models' answers."""

from __future__ import annotations

from megatron_aligndistil.config.evaluation_schema import RewardEvaluationConfig
from megatron_aligndistil.launch.evaluate_pairwise import Comparison


def prepare(config: RewardEvaluationConfig) -> Comparison:
    """Any prompts, and no judge."""
    return Comparison("reward", "Rewards of answers", config, None)
