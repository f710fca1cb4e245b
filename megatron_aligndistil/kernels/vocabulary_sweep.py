"""The driver of every differentiable op: a per-token statistic of a softmax over a sharded vocabulary.

Forward: one pass over chunks of tokens that keeps K words a token, one all-gather of them, a local merger. Backward: a
second pass recomputes each chunk's logits and forms their gradient, already times the token's upstream weight, so that
any per-token weight is exact. No tensor of [T, V / TP] exists in either pass, and there is one collective whatever the
number of chunks; the price is each head product of the forward pass once more (8 products a step with two teachers
instead of 5).

Shapes: T tokens, C tokens of one chunk, H hidden size, V true vocabulary entries of this shard, R tensor-parallel
ranks, K words a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aligndistil.kernels.head_product import HeadProduct, statistic_dtype
from megatron_aligndistil.kernels.partials import gather_partials
from megatron_aligndistil.types import VocabHead


@dataclass(frozen=True)
class Merged:
    """What the shards' partials come to.

    outputs  [T] each: the differentiable statistic, then any number of detached ones
    state    [T] each: what ``logit_gradient`` needs of the whole vocabulary
    """

    outputs: tuple[Tensor, ...]
    state: tuple[Tensor, ...]


class Statistic(Protocol):
    """One op: its words, their merger, and its gradient with respect to the logits."""

    words: int

    def partials_KC(self, logits_CV: Tensor, rows: slice) -> Tensor:
        """This shard's words of the chunk ``rows``: [K, C]."""

    def merge(self, partials_RKT: Tensor) -> Merged:
        """The statistic from every shard's words."""

    def logit_gradient_CV(self, logits_CV: Tensor, rows: slice, state: tuple[Tensor, ...]) -> Tensor:
        """Gradient of the first output; ``state`` is the chunk's part of ``Merged.state``."""


def chunks(n_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Consecutive slices of at most ``chunk_tokens`` tokens."""
    for start in range(0, n_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, n_tokens))


def sweep(hidden_TH: Tensor, head: VocabHead, statistic: Statistic, chunk_tokens: int) -> tuple[Tensor, ...]:
    """The statistic's outputs, [T] each; the first is differentiable in ``hidden_TH`` and ``head.weight``.

    The weight's gradient accumulates in fp32 (fp64). Where mcore's DDP gave the weight a ``main_grad`` of that type it
    is added there, without rounding to the weight's own type, and zeros go the ordinary way: DDP's hook then adds
    nothing for a head, or the embedding's part where the weight is tied. Unlike mcore's own fused accumulation, this
    doesn't touch ``grad_added_to_main_grad``, which would make the hook drop the embedding's part unless somebody also
    set ``zero_out_wgrad``. ``torch.autograd.grad`` on such a weight therefore sees zeros; its gradient is in
    ``main_grad``.
    """
    return _Sweep.apply(hidden_TH, head.weight, head, statistic, chunk_tokens)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight: Tensor, head: VocabHead, statistic: Statistic, chunk_tokens: int
    ) -> tuple[Tensor, ...]:
        dtype = statistic_dtype(hidden_TH, weight)
        product = HeadProduct(hidden_TH, head, dtype)
        partials_KT = hidden_TH.new_empty((statistic.words, hidden_TH.shape[0]), dtype=dtype)
        for rows in chunks(hidden_TH.shape[0], chunk_tokens):
            partials_KT[:, rows] = statistic.partials_KC(product.logits_CV(rows), rows)
        merged = statistic.merge(gather_partials(partials_KT, head.group))
        ctx.save_for_backward(hidden_TH, weight, *merged.state)
        ctx.head, ctx.statistic, ctx.chunk_tokens, ctx.dtype = head, statistic, chunk_tokens, dtype
        # Not through save_for_backward: other users of the weight write to it between the two passes.
        ctx.main_grad = getattr(weight, "main_grad", None)
        ctx.mark_non_differentiable(*merged.outputs[1:])
        return merged.outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight, *state = ctx.saved_tensors
        head, upstream_T = ctx.head, upstream[0].to(ctx.dtype)
        product = HeadProduct(hidden_TH, head, ctx.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_gradient_TH = torch.empty_like(hidden_TH) if wants_hidden else None
        accumulator, weight_gradient = (
            _weight_gradient(weight, ctx.main_grad, ctx.dtype) if wants_weight else (None, None)
        )
        for rows in chunks(hidden_TH.shape[0], ctx.chunk_tokens):
            chunk_state = tuple(values_T[rows] for values_T in state)
            gradient_CV = ctx.statistic.logit_gradient_CV(product.logits_CV(rows), rows, chunk_state)
            gradient_CV.mul_(upstream_T[rows, None])
            if hidden_gradient_TH is not None:
                hidden_gradient_TH[rows] = product.hidden_gradient_CH(gradient_CV).to(hidden_TH.dtype)
            if accumulator is not None:
                product.add_weight_gradient(gradient_CV, rows, accumulator[: head.valid_columns])
        if weight_gradient is None and accumulator is not None:
            weight_gradient = accumulator.to(weight.dtype)
        return hidden_gradient_TH, weight_gradient, None, None, None


def _weight_gradient(weight: Tensor, main_grad: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(where to accumulate, what to return; None: the accumulator itself)."""
    if main_grad is not None and main_grad.dtype == dtype and main_grad.shape == weight.shape:
        return main_grad, torch.zeros_like(weight)
    return torch.zeros_like(weight, dtype=dtype), None
