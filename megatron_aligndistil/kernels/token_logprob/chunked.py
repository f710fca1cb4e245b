"""Log-probability of a label from one sweep: words (m, s, the label's logit where this shard holds it).

A fourth word, sum e x, is for the entropy, log s - E[x], where that is asked for.

Shapes: T tokens, C tokens of one chunk, V columns of a tile, N parts or ranks, K words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.kernels.backends.backend import Backend
from megatron_aligndistil.kernels.partials import MergedSoftmax
from megatron_aligndistil.kernels.statistic import Merged, Statistic, Tile
from megatron_aligndistil.types import VocabHead


class LabelLogprob(Statistic):
    """log softmax(z)[label]; its gradient with respect to z is onehot(label) - softmax(z)."""

    others = ()
    kept = 1

    def __init__(self, backend: Backend, labels_T: Tensor, head: VocabHead, entropy: bool) -> None:
        self.backend, self.entropy = backend, entropy
        self.words = self.local_words = 4 if entropy else 3
        self.column_T = labels_T - head.first_column

    def _columns(self, tile: Tile) -> Tensor:
        """Where the tile holds the labels [C], -1 where it doesn't."""
        column_C = self.column_T[tile.rows] - tile.columns.start
        return column_C.where((column_C >= 0) & (column_C < tile.columns.stop - tile.columns.start), -1)

    def partials(self, logits: list[Tensor], tile: Tile) -> Tensor:
        return self.backend.label_sums(logits[0], self._columns(tile), self.entropy)

    def combine(self, words_NKT: Tensor) -> Tensor:
        max_NT, sum_NT, label_NT, *rest = words_NKT.unbind(1)
        softmax = MergedSoftmax.of(max_NT, sum_NT)
        weighted = [softmax.total(weighted_NT + sum_NT * softmax.shift_NT) for weighted_NT in rest]
        return torch.stack((softmax.max_T, softmax.sum_T, label_NT.sum(0), *weighted))

    def finish(self, words_KT: Tensor, own_KT: Tensor, rows: slice) -> Merged:
        max_T, sum_T, label_T, *rest = words_KT
        # The large terms first: exact where the label is the maximum.
        logprob_T = (label_T - max_T) - sum_T.log()
        entropy = (sum_T.log() - rest[0] / sum_T,) if self.entropy else ()
        return Merged((logprob_T, *entropy), (max_T, sum_T))

    def logit_gradient(
        self, logits: list[Tensor], tile: Tile, state: tuple[Tensor, ...], out_CV: Tensor, fresh: bool
    ) -> None:
        max_C, sum_C = state
        self.backend.label_gradient(logits[0], self._columns(tile), max_C, sum_C, out_CV)
