"""Log-probability of a label from one sweep: words (m, s, the label's logit where this shard holds it).

Shapes: T tokens, C tokens of one chunk, V true vocabulary entries of this shard, R tensor-parallel ranks, K words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.kernels.partials import MergedSoftmax, shifted
from megatron_aligndistil.kernels.vocabulary_sweep import Merged
from megatron_aligndistil.types import VocabHead


class LabelLogprob:
    """log softmax(z)[label]; its gradient with respect to z is onehot(label) - softmax(z)."""

    words = 3

    def __init__(self, labels_T: Tensor, head: VocabHead) -> None:
        column_T = labels_T - head.first_column
        self.held_T = (column_T >= 0) & (column_T < head.valid_columns)
        self.column_T = column_T.masked_fill(~self.held_T, 0)

    def partials_KC(self, logits_CV: Tensor, rows: slice) -> Tensor:
        max_C, shifted_CV = shifted(logits_CV)
        label_C = torch.zeros_like(max_C)
        if logits_CV.shape[1]:
            label_C = logits_CV.gather(1, self.column_T[rows, None]).squeeze(1) * self.held_T[rows]
        return torch.stack((max_C, shifted_CV.exp().sum(-1), label_C))

    def merge(self, partials_RKT: Tensor) -> Merged:
        max_RT, sum_RT, label_RT = partials_RKT.unbind(1)
        softmax = MergedSoftmax.of(max_RT, sum_RT)
        # The large terms first: exact where the label is the maximum.
        logprob_T = (label_RT.sum(0) - softmax.max_T) - softmax.sum_T.log()
        return Merged((logprob_T,), (softmax.max_T, softmax.sum_T))

    def logit_gradient_CV(self, logits_CV: Tensor, rows: slice, state: tuple[Tensor, ...]) -> Tensor:
        max_C, sum_C = state
        gradient_CV = (logits_CV - max_C[:, None]).exp_().div_(-sum_C[:, None])
        if logits_CV.shape[1]:
            gradient_CV.scatter_add_(1, self.column_T[rows, None], self.held_T[rows, None].to(gradient_CV.dtype))
        return gradient_CV
