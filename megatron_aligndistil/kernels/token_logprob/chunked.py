"""Log-probability of a label from one sweep: words (m, s, the label's logit where this shard holds it, sum e x).

The last word is for the entropy alone, log s - E[x], and crosses the ranks only where that is asked for.

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
    local_words = 4
    kept = 1

    def __init__(self, backend: Backend, labels_T: Tensor, head: VocabHead, entropy: bool) -> None:
        self.backend, self.entropy = backend, entropy
        self.words = 4 if entropy else 3
        self.column_T = labels_T - head.first_column

    def _label(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The label's column in the tile [C, 1], 0 where it isn't there, and whether it is [C]."""
        column_C = self.column_T[tile.rows] - tile.columns.start
        held_C = (column_C >= 0) & (column_C < tile.columns.stop - tile.columns.start)
        return column_C.where(held_C, 0)[:, None], held_C

    def partials(self, logits: list[Tensor], tile: Tile) -> Tensor:
        sums_NKC = self.backend.softmax_sums(logits[0])
        label_NC = torch.zeros_like(sums_NKC[:, 0])
        if logits[0].shape[1]:
            column_C1, held_C = self._label(tile)
            label_NC[0] = logits[0].gather(1, column_C1).squeeze(1) * held_C
        return torch.stack((*sums_NKC[:, :2].unbind(1), label_NC, sums_NKC[:, 2]), 1)

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
        self.backend.softmax_gradient(logits[0], max_C, sum_C, out_CV)
        if not out_CV.shape[1]:
            return
        column_C1, held_C = self._label(tile)
        # Anew, not onto the stored -pi: that has been rounded to the type of ``out_CV``.
        probability_C = (logits[0].gather(1, column_C1).squeeze(1) - max_C).exp() / sum_C
        label_C = (1 - probability_C).to(out_CV.dtype).where(held_C, out_CV.gather(1, column_C1).squeeze(1))
        out_CV.scatter_(1, column_C1, label_C[:, None])
