"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from typing import Any

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.config.schema import SFTRunConfig
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_logprob import token_logprob
from megatron_aligndistil.losses.supervised import supervised_loss
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, LossOutput


def sft(config: SFTRunConfig) -> Algorithm:
    """The negative log-likelihood of response tokens."""
    kernel = KernelSettings.of(config.model.kernel)

    def loss(policy: Projection, batch: Batch, annotation: Any) -> LossOutput:
        return supervised_loss(token_logprob(policy.hidden_TH, policy.head, batch.response_labels, kernel))

    return Algorithm(name="sft", kind="demonstration", loss=loss)
