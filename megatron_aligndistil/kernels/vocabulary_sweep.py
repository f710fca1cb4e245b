"""The driver of every differentiable op: a per-token statistic of a softmax over a sharded vocabulary.

A sweep makes tiles of logits (a chunk of tokens by some columns), keeps K words a token of them, gathers those over the
ranks and merges. The gradient of the logits needs the merged words, hence two plans:

S, store      chunk by chunk: one sweep, the collective, and at once the gradient of the chunk's logits, which waits for
              the backward pass in the operands' type [T, V]. Each head product runs once: 5 a step with two teachers.
R, recompute  one sweep and one collective; the backward pass makes the logits again. 8 products, no such tensor.

The backward pass multiplies by the token's upstream weight u after the stored gradient g: dH = u (g W), dW = g' (u H),
so any weight a token is exact, and neither plan has a collective there.

Shapes: T tokens, H hidden size, V true vocabulary entries of this shard, K words a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aligndistil.kernels.gradients import Gradients
from megatron_aligndistil.kernels.partials import gather_partials
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.statistic import Merged, Statistic, Tile, Tiles
from megatron_aligndistil.types import VocabHead


def sweep(
    hidden_TH: Tensor, head: VocabHead, statistic: Statistic, settings: KernelSettings, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The statistic's outputs, [T] ``dtype`` each; the first is differentiable in ``hidden_TH`` and ``head.weight``.

    The weight's gradient accumulates in fp32 (fp64). Where mcore's DDP gave the weight a ``main_grad`` of that type it
    is added there, without rounding to the weight's own type, and autograd is given None: DDP's hook still runs and
    adds nothing for a head, or the embedding's part where the weight is tied. (Its ``overlap_grad_reduce`` insists on a
    gradient and can't be used with this.) Unlike mcore's own fused accumulation, this doesn't touch
    ``grad_added_to_main_grad``, which would make the hook drop the embedding's part unless somebody also set
    ``zero_out_wgrad``. ``torch.autograd.grad`` on such a weight sees None; its gradient is in ``main_grad``.
    """
    return _Sweep.apply(hidden_TH, head.weight, head, statistic, settings, dtype)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight: Tensor,
        head: VocabHead,
        statistic: Statistic,
        settings: KernelSettings,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        policy = statistic.backend.product(hidden_TH, head, dtype)
        tiles = Tiles.of(policy, statistic, settings, wants_gradient=any(ctx.needs_input_grad[:2]))
        merged, ctx.gradient_TV = _store(tiles, head) if tiles.tiling.stored else (_measure(tiles, head), None)
        ctx.save_for_backward(hidden_TH, weight, *merged.state)
        ctx.head, ctx.tiles = head, tiles
        # Not through save_for_backward: other users of the weight write to it between the two passes.
        ctx.main_grad = getattr(weight, "main_grad", None)
        ctx.mark_non_differentiable(*merged.outputs[1:])
        return merged.outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, *state = ctx.saved_tensors
        tiles, upstream_T = ctx.tiles, upstream[0].to(ctx.tiles.policy.dtype) / ctx.head.temperature
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        gradients = Gradients(tiles, upstream_T, wants_hidden)
        if wants_weight:
            gradients.accumulate_into(weight, ctx.main_grad)
        if ctx.gradient_TV is not None:
            gradients.add_stored(ctx.gradient_TV)
        else:
            gradients.add_recomputed(tuple(state))
        return gradients.hidden_TH, gradients.of_weight, None, None, None, None


def _measure(tiles: Tiles, head: VocabHead) -> Merged:
    """The statistic of all tokens by one collective; R's forward pass."""
    statistic, policy = tiles.statistic, tiles.policy
    own_KT = policy.hidden_TH.new_empty((statistic.local_words, tiles.tokens), dtype=policy.dtype)
    widths = [tiles.tiling.tile_columns] * len(tiles.products)
    for rows in tiles.chunks():
        own_KT[:, rows] = tiles.words(rows, tiles.buffers(rows, widths))
    return _merged(statistic, own_KT, head, slice(0, tiles.tokens))


def _merged(statistic: Statistic, own_KT: Tensor, head: VocabHead, rows: slice) -> Merged:
    words_KT = statistic.combine(gather_partials(own_KT[: statistic.words], head.group))
    return statistic.finish(words_KT, own_KT, rows)


def _store(tiles: Tiles, head: VocabHead) -> tuple[Merged, Tensor]:
    """The statistic and the gradient of all logits [T, V]; S's forward pass, with a collective a chunk."""
    statistic, policy, tiling = tiles.statistic, tiles.policy, tiles.tiling
    gradient_TV = policy.empty(tiles.tokens, tiles.width, policy.operand_dtype)
    widths = [tiles.width] * statistic.kept + [tiling.tile_columns] * (len(tiles.products) - statistic.kept)
    merged = []
    buffers: list[Tensor] = []
    for rows in tiles.chunks():
        if not buffers or buffers[0].shape[0] != rows.stop - rows.start:
            buffers = tiles.buffers(rows, widths)
        merged.append(_merged(statistic, tiles.words(rows, buffers), head, rows))
        for columns in tiles.columns:
            kept = [buffer[:, columns] for buffer in buffers[: statistic.kept]]
            out_CV = gradient_TV[rows, columns]
            statistic.logit_gradient(kept, Tile(rows, columns), merged[-1].state, out_CV, fresh=False)
    return _joined(merged) if merged else _measure(tiles, head), gradient_TV


def _joined(merged: list[Merged]) -> Merged:
    """Chunks one after another."""
    outputs, states = zip(*((chunk.outputs, chunk.state) for chunk in merged), strict=True)
    return Merged(
        tuple(torch.cat(values) for values in zip(*outputs, strict=True)),
        tuple(torch.cat(values) for values in zip(*states, strict=True)),
    )
