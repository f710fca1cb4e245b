"""The language-model head of a sharded model, as the kernels take it, and the hidden states that go with it."""

from __future__ import annotations

from dataclasses import dataclass

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
