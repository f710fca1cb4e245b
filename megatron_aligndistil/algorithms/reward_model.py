"""Reward models (paper Eq. 1): a head of one output, read at the last token."""

from __future__ import annotations

from typing import Any

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.algorithms.statistics import sequence_scores
from megatron_aligndistil.config.schema import RewardModelRunConfig
from megatron_aligndistil.losses.reward_model import reward_model_loss
from megatron_aligndistil.models.heads import ScalarProjection
from megatron_aligndistil.types import Batch, LossOutput


def reward_model(config: RewardModelRunConfig) -> Algorithm:
    """Bradley-Terry on preference pairs."""
    settings = config.model.reward_model

    def loss(policy: ScalarProjection, batch: Batch, annotation: Any) -> LossOutput:
        return reward_model_loss(sequence_scores(policy, batch), settings.margin_regularisation)

    return Algorithm(name="reward_model", kind="preference", loss=loss, scalar=True)
