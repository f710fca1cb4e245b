"""SimPO: preference pairs without a reference."""

from __future__ import annotations

from typing import Any

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.algorithms.statistics import sequence_logprobs
from megatron_aligndistil.config.schema import SimPORunConfig
from megatron_aligndistil.losses.simpo import simpo_loss
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, LossOutput


def simpo(config: SimPORunConfig) -> Algorithm:
    """The chosen response's mean log-prob beats the rejected one's by a margin."""
    settings, logprobs = config.model.simpo, sequence_logprobs(config.model.kernel)

    def loss(policy: Projection, batch: Batch, annotation: Any) -> LossOutput:
        return simpo_loss(logprobs(policy, batch), batch.response_lengths, settings.beta, settings.gamma)

    return Algorithm(name="simpo", kind="preference", loss=loss)
