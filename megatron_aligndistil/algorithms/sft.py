"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from typing import Any

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.algorithms.statistics import response_logprobs
from megatron_aligndistil.config.schema import SFTRunConfig
from megatron_aligndistil.losses.supervised import supervised_loss
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, LossOutput


def sft(config: SFTRunConfig) -> Algorithm:
    """The negative log-likelihood of response tokens."""
    logprobs = response_logprobs(config.model.kernel)

    def loss(policy: Projection, batch: Batch, annotation: Any) -> LossOutput:
        return supervised_loss(logprobs(policy, batch))

    return Algorithm(name="sft", kind="demonstration", loss=loss)
