"""The sweeps as Triton kernels, around products that leave the accumulator in fp32; for GPUs.

Shapes: C tokens of a chunk, H hidden size, V columns of a tile, K words a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.kernels.backends.backend import Backend, HeadProduct, Softmax, TargetScalars
from megatron_aligndistil.kernels.backends.pytorch import PyTorchProduct
from megatron_aligndistil.kernels.triton_sweeps import extrapolation, softmax, token_kl
from megatron_aligndistil.types import VocabHead


class TritonBackend(Backend):
    """Each sweep is one kernel, which reads every logit once and overwrites none."""

    kept_of_extrapolation = 3

    def product(self, hidden_TH: Tensor, head: VocabHead, dtype: torch.dtype) -> HeadProduct:
        return PyTorchProduct(hidden_TH, head, dtype)

    def softmax_sums(self, logits_CV: Tensor) -> Tensor:
        return softmax.softmax_sums(logits_CV)[None]

    def label_sums(self, logits_CV: Tensor, column_C: Tensor, entropy: bool) -> Tensor:
        return softmax.label_sums(logits_CV, column_C, entropy)[None]

    def label_gradient(self, logits_CV: Tensor, column_C: Tensor, max_C: Tensor, sum_C: Tensor, out_CV: Tensor) -> None:
        softmax.label_gradient(logits_CV, column_C, max_C, sum_C, out_CV)

    def total_variation(self, d_CV: Tensor, r_CV: Tensor, softmax_d: Softmax, softmax_r: Softmax) -> Tensor:
        return extrapolation.total_variation(d_CV, r_CV, softmax_d, softmax_r)[None]

    def target_sums(self, d_CV: Tensor, r_CV: Tensor, scalars: TargetScalars) -> Tensor:
        return extrapolation.target_sums(d_CV, r_CV, _in_order(scalars))[None]

    def extrapolated_sums(self, p_CV: Tensor, d_CV: Tensor, r_CV: Tensor, scalars: TargetScalars) -> Tensor:
        return extrapolation.extrapolated_sums((p_CV, d_CV, r_CV), _in_order(scalars))[None]

    def extrapolated_gradient(
        self, logits: list[Tensor], scalars: TargetScalars, state: tuple[Tensor, ...], out_CV: Tensor
    ) -> None:
        p_CV, d_CV, r_CV = logits
        max_C, sum_C, mean_C = state
        extrapolation.extrapolated_gradient((p_CV, d_CV, r_CV), _in_order(scalars), (max_C, sum_C, mean_C), out_CV)

    def token_kl_sums(self, p_CV: Tensor, q_CV: Tensor, from_other: bool) -> Tensor:
        return token_kl.token_kl_sums(p_CV, q_CV, from_other)[None]

    def token_kl_gradient(
        self, p_CV: Tensor, q_CV: Tensor, state: tuple[Tensor, ...], from_other: bool, out_CV: Tensor
    ) -> None:
        max_C, sum_C, mean_C, other_max_C, other_sum_C = state
        of_row = (max_C, sum_C, mean_C, other_max_C, other_sum_C)
        token_kl.token_kl_gradient(p_CV, q_CV, of_row, from_other, out_CV)


def _in_order(scalars: TargetScalars) -> tuple[Tensor, Tensor, Tensor]:
    return scalars.log_z_d, scalars.log_z_r, scalars.alpha
