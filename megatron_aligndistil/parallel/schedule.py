"""Running a micro-batched pass through the pipeline, by Megatron-Core's own schedules.

The schedule calls the model on every stage and, on the last one, a function of the hidden states: a loss (training) or
what to keep of them (frozen roles, validation). Nothing is sent by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from megatron_aligndistil.parallel import context
from megatron_aligndistil.types import Batch, LossOutput

Kept = TypeVar("Kept")


def forward_only(
    chunks: Sequence[nn.Module], batches: Sequence[Batch], keep: Callable[[Tensor, int], Kept]
) -> list[Kept]:
    """One pass without gradients; ``keep(hidden_SBH, micro-batch index)`` runs on the last stage.

    Returns what it kept, one entry a micro-batch; empty on the other stages.
    """

    def collect(index: int, hidden_SBH: Tensor, non_loss_data: bool = True) -> Kept:
        return keep(hidden_SBH, index)

    with torch.no_grad():
        return _run(chunks, batches, collect, forward_only=True, collect_non_loss_data=True)


def forward_backward(
    chunks: Sequence[nn.Module], batches: Sequence[Batch], loss: Callable[[Tensor, int], LossOutput]
) -> list[LossOutput]:
    """One pass with gradients, accumulated and divided by the global count of ``LossOutput.count``.

    Returns the micro-batches' detached losses; empty on all but the last stage.
    """

    def split(index: int, hidden_SBH: Tensor) -> tuple[Tensor, Tensor, LossOutput]:
        output = loss(hidden_SBH, index)
        detached = LossOutput(output.total.detach(), output.count, output.sums, output.maxima)
        count = torch.tensor(output.count, dtype=torch.int, device=output.total.device)
        return output.total, count, detached

    return _run(chunks, batches, split, forward_only=False, collect_non_loss_data=False)


def _run(
    chunks: Sequence[nn.Module],
    batches: Sequence[Batch],
    on_last_stage: Callable[..., Any],
    forward_only: bool,
    collect_non_loss_data: bool,
) -> list[Any]:
    def step(batch_iterator: Iterator[tuple[int, Batch]], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        index, batch = next(batch_iterator)
        tokens, position_ids = context.own_columns(batch.tokens), context.own_columns(batch.position_ids)
        hidden = model(tokens, position_ids, None, packed_seq_params=packed_seq_params(batch))
        return hidden, lambda output, **flags: on_last_stage(index, output, **flags)

    longest = max(batch.tokens.shape[1] for batch in batches)
    iterators: list[Iterator[tuple[int, Batch]]] = [iter(enumerate(batches)) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=longest,
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )


def packed_seq_params(batch: Batch) -> PackedSeqParams | None:
    """How attention splits a packed row; None where each row is one sequence."""
    if batch.cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
