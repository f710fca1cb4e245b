"""A sharded model's head applied, or made ready to be applied by a kernel, to the last stage's hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import context, groups
from megatron_aligndistil.types import Batch, VocabHead


@dataclass(frozen=True)
class Projection:
    """What a kernel turns into statistics: the hidden states that predict response tokens [T, H], and the head."""

    hidden_TH: Tensor
    head: VocabHead


@dataclass(frozen=True)
class ScalarProjection:
    """A scalar head's number at every position of whole rows: [B, S] in float32 (float64 for a float64 model)."""

    values_BS: Tensor


def project(chunk: HiddenStateModel, hidden_SBH: Tensor, batch: Batch) -> Projection | ScalarProjection:
    """What a loss, or what keeps a role's output, takes of a micro-batch's last hidden states.

    ``chunk`` is the last one of the last pipeline stage, ``hidden_SBH`` what it returned: this rank's positions of them
    under context or sequence parallelism.
    """
    if chunk.architecture.scalar_head:
        return ScalarProjection(_scalar_values(chunk, hidden_SBH))
    return Projection(response_hidden_states(hidden_SBH, batch, chunk.config.sequence_parallel), head_of(chunk))


def _scalar_values(chunk: HiddenStateModel, hidden_SBH: Tensor) -> Tensor:
    """Every tensor rank computes the same values, so each has the whole gradient of its hidden states: none is summed.

    Under sequence parallelism a rank keeps its positions of that gradient.
    """
    if chunk.config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)
    hidden_SBH = context.gather_positions(hidden_SBH)
    wide = torch.float64 if hidden_SBH.dtype is torch.float64 else torch.float32
    weight_1H = chunk.score_head.weight
    return (hidden_SBH.to(wide) @ weight_1H.to(wide).T).squeeze(-1).transpose(0, 1)


@torch.no_grad()
def draw_scalar_head(weight_1H: Tensor, seed: int) -> None:
    """Fill a scalar head from N(0, 1/(H + 1)): the same values for a seed on every rank and device.

    A score starts with a variance of about one where hidden states come from an RMSNorm.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(weight_1H.shape, generator=generator, dtype=torch.float32)
    weight_1H.copy_(drawn / (weight_1H.shape[-1] + 1) ** 0.5)


def head_of(chunk: HiddenStateModel) -> VocabHead:
    """The head's shard on this rank; ``chunk`` is the last one of the last pipeline stage."""
    tied = chunk.share_embeddings_and_output_weights
    weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
    axis = groups.tensor()
    return VocabHead(
        weight=weight,
        vocab_size=chunk.architecture.vocab_size,
        first_column=axis.rank * weight.shape[0],
        group=axis.group if axis.size > 1 else None,
    )


def response_hidden_states(hidden_SBH: Tensor, batch: Batch, sequence_parallel: bool) -> Tensor:
    """The hidden states that predict response tokens, [T, H], in the order of ``batch.loss_mask``.

    The head's products are partial sums over the tensor-parallel group in the backward pass; the region operators here
    reduce (or, under sequence parallelism, reduce-scatter) that gradient.
    """
    if sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True)
        return context.gather_positions(hidden_SBH).transpose(0, 1)[batch.loss_mask]
    # Transposed first: Megatron-Core's backward reduces a copy of a gradient that isn't contiguous, and returns the
    # gradient itself, unreduced.
    hidden_BSH = context.gather_positions(hidden_SBH).transpose(0, 1)
    return copy_to_tensor_model_parallel_region(hidden_BSH)[batch.loss_mask]
