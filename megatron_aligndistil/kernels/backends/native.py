"""The sweeps in compiled loops, for CPUs.

Tiles lie vocabulary first in memory: a [C, V] tensor here is the transposed view of [V, C] rows, so that the products
read the head as it lies and every loop over tokens is a vector loop. bf16 products leave the accumulator in fp32, which
PyTorch's own can't on a CPU.

Shapes: T tokens, C tokens of a chunk, H hidden size, V columns of a tile, K words a token, N threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_aligndistil.kernels.backends.backend import (
    Backend,
    HeadProduct,
    Softmax,
    TargetScalars,
    label_logits,
    put_label_gradient,
)
from megatron_aligndistil.types import VocabHead


class NativeProduct(HeadProduct):
    """Products of fp32 or bf16 operands with fp32 results; the gradients' fp32 ones are faster in PyTorch."""

    def __init__(self, operators: Any, hidden_TH: Tensor, head: VocabHead, dtype: torch.dtype) -> None:
        super().__init__(hidden_TH, head, dtype)
        self.operators = operators
        self.paired = self.hidden_TH.dtype == torch.bfloat16
        self._factor: tuple[slice, Tensor] | None = None

    def empty(self, tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
        rows_VC = self.hidden_TH.new_empty((columns, tokens + tokens % 2), dtype=dtype)
        self.operators.advise_large_pages(rows_VC)
        rows_VC[:, tokens:] = 0  # bf16 products read an even number of tokens
        return rows_VC[:, :tokens].t()

    def logits(self, rows: slice, columns: slice, out_CV: Tensor) -> None:
        self.operators.product(self.weight_VH[columns], self._hidden_factor(rows), out_CV.t(), False)
        if self.temperature != 1.0:
            out_CV.div_(self.temperature)

    def _hidden_factor(self, rows: slice) -> Tensor:
        """The chunk's hidden states as a right factor, [H, C]; a chunk has many tiles, so the last one is kept."""
        if self._factor is None or self._factor[0] != rows:
            words_CH = self.hidden_TH[rows]
            if self.paired:
                words_CH = words_CH.contiguous().view(torch.int32)  # two hidden units a word
            words_HC = words_CH.new_empty((words_CH.shape[1], words_CH.shape[0]))
            self.operators.transpose_into(words_CH, words_HC)
            factor = words_HC.view(torch.bfloat16).view(*words_HC.shape, 2) if self.paired else words_HC
            self._factor = (rows, factor)
        return self._factor[1]

    def add_hidden_gradient(self, gradient_CV: Tensor, columns: slice, out_CH: Tensor) -> None:
        if not self.paired:
            out_CH.addmm_(gradient_CV, self.weight_VH[columns])
            return
        tokens, width = gradient_CV.shape
        left_CV = gradient_CV.new_empty((tokens, width + width % 2))
        left_CV[:, width:] = 0
        self.operators.transpose_into(gradient_CV.t(), left_CV[:, :width])
        self.operators.product(left_CV, self.operators.paired_rows(self.weight_VH[columns]), out_CH, True)

    def add_weight_gradient(self, gradient_CV: Tensor, hidden_CH: Tensor, out_VH: Tensor) -> None:
        if not self.paired:
            out_VH.addmm_(gradient_CV.t(), hidden_CH)
            return
        self.operators.product(gradient_CV.t(), self.operators.paired_rows(hidden_CH), out_VH, True)


class NativeBackend(Backend):
    """Calls into the compiled library."""

    kept_of_extrapolation = 2

    def __init__(self, operators: Any) -> None:
        self.operators = operators

    def product(self, hidden_TH: Tensor, head: VocabHead, dtype: torch.dtype) -> HeadProduct:
        return NativeProduct(self.operators, hidden_TH, head, dtype)

    def softmax_sums(self, logits_CV: Tensor) -> Tensor:
        return self.operators.softmax_sums(logits_CV.t())[:, :2]

    def label_sums(self, logits_CV: Tensor, column_C: Tensor, entropy: bool) -> Tensor:
        max_NC, sum_NC, weighted_NC = self.operators.softmax_sums(logits_CV.t()).unbind(1)
        label_NC = torch.zeros_like(sum_NC)
        label_NC[0] = label_logits(logits_CV, column_C)
        words = (max_NC, sum_NC, label_NC)
        return torch.stack((*words, weighted_NC) if entropy else words, 1)

    def label_gradient(self, logits_CV: Tensor, column_C: Tensor, max_C: Tensor, sum_C: Tensor, out_CV: Tensor) -> None:
        self.operators.softmax_gradient(logits_CV.t(), max_C, sum_C, out_CV.t())
        put_label_gradient(logits_CV, column_C, max_C, sum_C, out_CV)

    def total_variation(self, d_CV: Tensor, r_CV: Tensor, softmax_d: Softmax, softmax_r: Softmax) -> Tensor:
        return self.operators.total_variation(d_CV.t(), r_CV.t(), *softmax_d, *softmax_r)

    def target_sums(self, d_CV: Tensor, r_CV: Tensor, scalars: TargetScalars) -> Tensor:
        self.operators.target_and_gap(d_CV.t(), r_CV.t(), scalars.log_z_d, scalars.log_z_r, scalars.alpha)
        return self.softmax_sums(d_CV)

    def extrapolated_sums(self, p_CV: Tensor, d_CV: Tensor, r_CV: Tensor, scalars: TargetScalars) -> Tensor:
        return self.operators.extrapolated_sums(
            p_CV.t(), d_CV.t(), r_CV.t(), scalars.log_z_d, scalars.log_z_r, scalars.alpha
        )

    def extrapolated_gradient(
        self, logits: list[Tensor], scalars: TargetScalars, state: tuple[Tensor, ...], out_CV: Tensor
    ) -> None:
        p_VC, d_VC = logits[0].t(), logits[1].t()
        if len(logits) == 3:
            self.operators.target_and_gap(d_VC, logits[2].t(), scalars.log_z_d, scalars.log_z_r, scalars.alpha)
        self.operators.extrapolated_gradient(p_VC, d_VC, *state, out_CV.t())

    def token_kl_sums(self, p_CV: Tensor, q_CV: Tensor, from_other: bool) -> Tensor:
        return self.operators.token_kl_sums(p_CV.t(), q_CV.t(), from_other)

    def token_kl_gradient(
        self, p_CV: Tensor, q_CV: Tensor, state: tuple[Tensor, ...], from_other: bool, out_CV: Tensor
    ) -> None:
        self.operators.token_kl_gradient(p_CV.t(), q_CV.t(), state, not from_other, out_CV.t())
