"""The products with a head's weight: logits forward, gradients of hidden states and weight backward.

Shapes: T tokens, C tokens of one chunk, H hidden size, V true vocabulary entries of this shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.types import VocabHead


def statistic_dtype(*tensors: Tensor) -> torch.dtype:
    """What statistics are computed in: float64 if an operand is, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class HeadProduct:
    """Hidden states and the true columns of a head's shard, multiplied chunk by chunk.

    Padding rows of the weight take no part: they are neither read nor given a gradient. bf16 logits rounded from the
    accumulator would move z* by 0.85 nat at alpha = 30 (METHOD, numerics), so products come out in ``dtype``. On a
    GPU the operands stay as they are and the accumulator is written out; a CPU's kernels cannot do that, and there the
    operands are converted, which is exact and as fast (fp32 GEMMs are a CPU's fastest): one fp32 copy of the shard for
    the duration of a sweep.
    """

    def __init__(self, hidden_TH: Tensor, head: VocabHead, dtype: torch.dtype) -> None:
        weight_VH = head.weight.detach()[: head.valid_columns]
        self.hidden_TH, self.dtype = hidden_TH.detach(), dtype
        self.native = hidden_TH.is_cuda and hidden_TH.dtype == weight_VH.dtype != dtype
        self.weight_VH = weight_VH if self.native else weight_VH.to(dtype)

    def _hidden_CH(self, rows: slice) -> Tensor:
        hidden_CH = self.hidden_TH[rows]
        return hidden_CH if self.native else hidden_CH.to(self.dtype)

    def _matmul(self, left: Tensor, right: Tensor) -> Tensor:
        if self.native:
            return torch.mm(left, right, out_dtype=self.dtype)
        return torch.mm(left, right)

    def logits_CV(self, rows: slice) -> Tensor:
        """Logits of the chunk ``rows`` over this shard's true columns, [C, V]."""
        return self._matmul(self._hidden_CH(rows), self.weight_VH.t())

    def hidden_gradient_CH(self, logit_gradient_CV: Tensor) -> Tensor:
        """This shard's part of the chunk's gradient of the hidden states, [C, H]."""
        return self._matmul(self._as_operand(logit_gradient_CV), self.weight_VH)

    def add_weight_gradient(self, logit_gradient_CV: Tensor, rows: slice, gradient_VH: Tensor) -> None:
        """Adds the chunk's gradient of the weight's true columns to ``gradient_VH`` [V, H], in place."""
        transposed_VC = self._as_operand(logit_gradient_CV).t()
        if self.native:
            gradient_VH += self._matmul(transposed_VC, self._hidden_CH(rows))
        else:
            gradient_VH.addmm_(transposed_VC, self._hidden_CH(rows))

    def _as_operand(self, gradient_CV: Tensor) -> Tensor:
        return gradient_CV.to(self.weight_VH.dtype)
