"""From the gradient of the logits to those of the hidden states and of the head's weight.

Shapes: T tokens, C tokens of one chunk, H hidden size, V true vocabulary entries of this shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.kernels.settings import slices
from megatron_aligndistil.kernels.statistic import Tile, Tiles


class Gradients:
    """What a backward pass adds up: dH = u (g W) and dW = g' (u H), u the tokens' upstream weights [T].

    hidden_TH  this shard's part of dH in the hidden states' type; None where nobody wants it
    of_weight  dW in the weight's type; None where it went to ``main_grad``, or nobody wants it
    """

    def __init__(self, tiles: Tiles, upstream_T: Tensor, wants_hidden: bool) -> None:
        self.tiles, self.policy, self.upstream_T1 = tiles, tiles.policy, upstream_T[:, None]
        self.hidden_TH = torch.empty_like(self.policy.hidden_TH) if wants_hidden else None
        self._accumulator_VH: Tensor | None = None
        self._weight_dtype: torch.dtype | None = None  # that dW is returned in

    def accumulate_into(self, weight: Tensor, main_grad: Tensor | None) -> None:
        """Wants dW: in ``main_grad`` where its type is the accumulators', else in a tensor of its own."""
        if main_grad is not None and main_grad.dtype == self.policy.dtype and main_grad.shape == weight.shape:
            self._accumulator_VH = main_grad
        else:
            self._accumulator_VH = torch.zeros_like(weight, dtype=self.policy.dtype)
            self._weight_dtype = weight.dtype

    @property
    def of_weight(self) -> Tensor | None:
        if self._accumulator_VH is None or self._weight_dtype is None:
            return None
        return self._accumulator_VH.to(self._weight_dtype)

    def add_stored(self, gradient_TV: Tensor) -> None:
        """From the gradient of all logits, which is only read."""
        rows = slice(0, self.tiles.tokens)
        out_TH, weighted_TH = self._chunk(rows)
        for columns in slices(self.tiles.width, self.tiles.tiling.stored_columns):
            self._add(gradient_TV[:, columns], columns, out_TH, weighted_TH)
        self._finish(rows, out_TH)

    def add_recomputed(self, state: tuple[Tensor, ...]) -> None:
        """From logits that are made again, tile by tile."""
        tiles = self.tiles
        widths = [tiles.tiling.tile_columns] * len(tiles.products)
        for rows in tiles.chunks():
            out_CH, weighted_CH = self._chunk(rows)
            buffers = tiles.buffers(rows, widths)
            gradient_CV = self.policy.empty(rows.stop - rows.start, widths[0], self.policy.operand_dtype)
            chunk_state = tuple(values_T[rows] for values_T in state)
            for columns in tiles.columns:
                out_CV = gradient_CV[:, : columns.stop - columns.start]
                tile = Tile(rows, columns)
                logits = tiles.logits(tile, buffers)
                tiles.statistic.logit_gradient(logits, tile, chunk_state, out_CV, fresh=True)
                self._add(out_CV, columns, out_CH, weighted_CH)
            self._finish(rows, out_CH)

    def _chunk(self, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """Where g W is added up, and u H; each None where nobody wants what comes of it."""
        hidden_CH = self.policy.hidden_TH[rows]
        out_CH = None if self.hidden_TH is None else torch.zeros_like(hidden_CH, dtype=self.policy.dtype)
        if self._accumulator_VH is None:
            return out_CH, None
        return out_CH, (self.upstream_T1[rows] * hidden_CH).to(self.policy.operand_dtype)

    def _add(self, gradient_CV: Tensor, columns: slice, out_CH: Tensor | None, weighted_CH: Tensor | None) -> None:
        if not gradient_CV.numel():
            return
        if out_CH is not None:
            self.policy.add_hidden_gradient(gradient_CV, columns, out_CH)
        if weighted_CH is not None and self._accumulator_VH is not None:
            self.policy.add_weight_gradient(gradient_CV, weighted_CH, self._accumulator_VH[columns])

    def _finish(self, rows: slice, out_CH: Tensor | None) -> None:
        if self.hidden_TH is not None and out_CH is not None:
            self.hidden_TH[rows] = out_CH.mul_(self.upstream_T1[rows])
