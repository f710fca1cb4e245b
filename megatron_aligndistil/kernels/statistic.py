"""What an op says about itself, and the tiles of logits that it is run over.

Shapes: T tokens, C tokens of one chunk, V true vocabulary entries of this shard, N parts of a tile, K words a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_aligndistil.kernels.backends.backend import Backend, HeadProduct
from megatron_aligndistil.kernels.settings import KernelSettings, Size, Tiling, device_type, slices


@dataclass(frozen=True)
class Merged:
    """What the shards' words come to.

    outputs  [T] each: the differentiable statistic, then any number of detached ones
    state    [T] each: what the gradient of the logits needs of the whole vocabulary
    """

    outputs: tuple[Tensor, ...]
    state: tuple[Tensor, ...]


@dataclass(frozen=True)
class Tile:
    """Tokens by columns of this shard."""

    rows: slice
    columns: slice


class Statistic(ABC):
    """One op: its words, their merger, and its gradient with respect to the policy's logits.

    backend      what makes the logits and runs the sweeps
    others       the models beside the policy whose logits it takes
    local_words  words a token of a tile
    words        the first of them, which cross the ranks
    kept         leading logits tensors that ``logit_gradient`` takes once ``partials`` ran on them
    """

    backend: Backend
    others: tuple[HeadProduct, ...]
    local_words: int
    words: int
    kept: int

    @abstractmethod
    def partials(self, logits: list[Tensor], tile: Tile) -> Tensor:
        """The words of a tile, in parts [N, K, C]; may overwrite all logits but the policy's."""

    @abstractmethod
    def combine(self, words_NKT: Tensor) -> Tensor:
        """The words of all parts together, [K, T]; K is ``local_words`` of tiles and ``words`` of ranks."""

    @abstractmethod
    def finish(self, words_KT: Tensor, own_KT: Tensor, rows: slice) -> Merged:
        """The statistic of ``rows``, from the words over all shards and this shard's own."""

    @abstractmethod
    def logit_gradient(
        self, logits: list[Tensor], tile: Tile, state: tuple[Tensor, ...], out_CV: Tensor, fresh: bool
    ) -> None:
        """Gradient of the first output, to ``out_CV``; ``state`` is the chunk's part of ``Merged.state``.

        ``logits`` are all models' as the products made them if ``fresh``, else the kept ones as ``partials`` left them.
        """


class Tiles:
    """The tiles of a call, and their logits."""

    def __init__(self, policy: HeadProduct, statistic: Statistic, tiling: Tiling) -> None:
        self.policy, self.statistic = policy, statistic
        self.products = (policy, *statistic.others)
        self.tokens, self.width = policy.hidden_TH.shape[0], policy.weight_VH.shape[0]
        self.tiling = replace(tiling, tile_columns=max(1, min(tiling.tile_columns, self.width)))
        self.columns = list(slices(self.width, tiling.tile_columns)) or [slice(0, 0)]

    @classmethod
    def of(cls, policy: HeadProduct, statistic: Statistic, settings: KernelSettings, wants_gradient: bool) -> Tiles:
        """Tiles as the settings and the device want them.

        From the padded columns, which are as many on every rank: the plans differ in their collectives, so ranks whose
        shards are part padding must not choose another.
        """
        size = Size(
            tokens=policy.hidden_TH.shape[0],
            columns=policy.padded_columns,
            device=device_type(policy.hidden_TH),
            models=1 + len(statistic.others),
            kept=statistic.kept,
            operand_bytes=policy.operand_dtype.itemsize,
            statistic_bytes=policy.dtype.itemsize,
        )
        return cls(policy, statistic, Tiling.choose(settings, size, wants_gradient))

    def chunks(self) -> list[slice]:
        return list(slices(self.tokens, self.tiling.chunk_tokens))

    def buffers(self, rows: slice, widths: Sequence[int]) -> list[Tensor]:
        """Room for a chunk's logits of each model, over so many columns."""
        tokens = rows.stop - rows.start
        return [
            product.empty(tokens, width, self.policy.dtype)
            for product, width in zip(self.products, widths, strict=True)
        ]

    def logits(self, tile: Tile, buffers: list[Tensor]) -> list[Tensor]:
        """The tile's logits, at the tile's place in buffers over all columns and at the start of others."""
        width = tile.columns.stop - tile.columns.start
        made = []
        for product, buffer in zip(self.products, buffers, strict=True):
            out_CV = buffer[:, tile.columns] if buffer.shape[1] == self.width else buffer[:, :width]
            product.logits(tile.rows, tile.columns, out_CV)
            made.append(out_CV)
        return made

    def words(self, rows: slice, buffers: list[Tensor]) -> Tensor:
        """This shard's words of a chunk, [K, C]."""
        parts = [
            self.statistic.partials(self.logits(tile, buffers), tile)
            for tile in (Tile(rows, columns) for columns in self.columns)
        ]
        return self.statistic.combine(torch.cat(parts))
