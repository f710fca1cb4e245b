"""What the algorithms keep of a model's pass. Shapes: T response tokens, N sequences."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Keep
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_logprob import token_logprob
from megatron_aligndistil.models.heads import Projection, ScalarProjection
from megatron_aligndistil.types import Batch


def response_logprobs(kernel: KernelConfig) -> Keep:
    """log π of the response tokens, nats, [T]."""
    settings = KernelSettings.of(kernel)

    def keep(projection: Projection, batch: Batch) -> Tensor:
        return token_logprob(projection.hidden_TH, projection.head, batch.response_labels, settings)

    return keep


def sequence_logprobs(kernel: KernelConfig) -> Keep:
    """log π of the responses, nats, [N]."""
    logprobs = response_logprobs(kernel)

    def keep(projection: Projection, batch: Batch) -> Tensor:
        return batch.sum_by_sequence(logprobs(projection, batch))

    return keep


def hidden_states(projection: Projection, batch: Batch) -> Tensor:
    """The hidden states that predict response tokens, [T, H]."""
    return projection.hidden_TH


def token_values(projection: ScalarProjection, batch: Batch) -> Tensor:
    """The value of the state in which each response token is chosen, [T]."""
    return projection.values_BS[batch.loss_mask]


def sequence_scores(projection: ScalarProjection, batch: Batch) -> Tensor:
    """The score at each sequence's last token, [N]."""
    return projection.values_BS[batch.last_token_mask]
