"""The sweeps in PyTorch, on any device and in any precision; what the other backends fall back on.

Shapes: C tokens of a chunk, H hidden size, V columns of a tile, K words a token.
"""

from __future__ import annotations

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


class PyTorchProduct(HeadProduct):
    """On a GPU bf16 operands stay as they are and the accumulator is written out. A CPU's products can't do that in
    PyTorch: there a tile's operands are converted, which is exact."""

    def __init__(self, hidden_TH: Tensor, head: VocabHead, dtype: torch.dtype) -> None:
        super().__init__(hidden_TH, head, dtype)
        self.native = hidden_TH.is_cuda and hidden_TH.dtype == self.weight_VH.dtype != dtype

    def _mm(self, left: Tensor, right: Tensor) -> Tensor:
        if self.native:
            return torch.mm(left, right, out_dtype=self.dtype)
        return torch.mm(left.to(self.dtype), right.to(self.dtype))

    def logits(self, rows: slice, columns: slice, out_CV: Tensor) -> None:
        left, right = self.hidden_TH[rows], self.weight_VH[columns].t()
        if self.native:
            torch.mm(left, right, out_dtype=self.dtype, out=out_CV)
        else:
            torch.mm(left.to(self.dtype), right.to(self.dtype), out=out_CV)
        if self.temperature != 1.0:
            out_CV.div_(self.temperature)

    def add_hidden_gradient(self, gradient_CV: Tensor, columns: slice, out_CH: Tensor) -> None:
        out_CH += self._mm(gradient_CV, self.weight_VH[columns])

    def add_weight_gradient(self, gradient_CV: Tensor, hidden_CH: Tensor, out_VH: Tensor) -> None:
        out_VH += self._mm(gradient_CV.t(), hidden_CH)


def target_and_gap(d_CV: Tensor, r_CV: Tensor, scalars: TargetScalars) -> tuple[Tensor, Tensor]:
    """(t, D) in the place of the teachers' logits.

    The target is normalised first: raw z_d + alpha (z_d - z_r) carries the arbitrary shift alpha (log Z_d - log Z_r).
    """
    logprob_d_CV = d_CV.sub_(scalars.log_z_d[:, None])
    gap_CV = torch.sub(logprob_d_CV, r_CV.sub_(scalars.log_z_r[:, None]), out=r_CV)
    return logprob_d_CV.addcmul_(scalars.alpha[:, None], gap_CV), gap_CV


def _shifted(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(m, z - m); m = -inf where there is no column."""
    if logits_CV.shape[1] == 0:
        return logits_CV.new_full((logits_CV.shape[0],), -torch.inf), logits_CV
    max_C = logits_CV.amax(-1)
    return max_C, logits_CV - max_C[:, None]


def _probabilities(logits_CV: Tensor, max_C: Tensor, sum_C: Tensor) -> Tensor:
    return (logits_CV - max_C[:, None]).exp_().div_(sum_C[:, None])


class PyTorchBackend(Backend):
    """One tile at a time, every step of it its own operator."""

    kept_of_extrapolation = 2

    def product(self, hidden_TH: Tensor, head: VocabHead, dtype: torch.dtype) -> HeadProduct:
        return PyTorchProduct(hidden_TH, head, dtype)

    def softmax_sums(self, logits_CV: Tensor) -> Tensor:
        max_C, x_CV = _shifted(logits_CV)
        return torch.stack((max_C, x_CV.exp().sum(-1)))[None]

    def label_sums(self, logits_CV: Tensor, column_C: Tensor, entropy: bool) -> Tensor:
        max_C, x_CV = _shifted(logits_CV)
        exp_CV = x_CV.exp()
        words = [max_C, exp_CV.sum(-1), label_logits(logits_CV, column_C)]
        return torch.stack([*words, exp_CV.mul_(x_CV).sum(-1)] if entropy else words)[None]

    def label_gradient(self, logits_CV: Tensor, column_C: Tensor, max_C: Tensor, sum_C: Tensor, out_CV: Tensor) -> None:
        out_CV.copy_(_probabilities(logits_CV, max_C, -sum_C))
        put_label_gradient(logits_CV, column_C, max_C, sum_C, out_CV)

    def total_variation(self, d_CV: Tensor, r_CV: Tensor, softmax_d: Softmax, softmax_r: Softmax) -> Tensor:
        difference_CV = _probabilities(d_CV, *softmax_d).sub_(_probabilities(r_CV, *softmax_r))
        return difference_CV.abs_().sum(-1).mul_(0.5)[None, None]

    def target_sums(self, d_CV: Tensor, r_CV: Tensor, scalars: TargetScalars) -> Tensor:
        max_C, x_CV = _shifted(target_and_gap(d_CV, r_CV, scalars)[0])
        return torch.stack((max_C, x_CV.exp_().sum(-1)))[None]

    def extrapolated_sums(self, p_CV: Tensor, d_CV: Tensor, r_CV: Tensor, scalars: TargetScalars) -> Tensor:
        max_C, x_CV = _shifted(p_CV)
        target_CV, gap_CV = target_and_gap(d_CV, r_CV, scalars)
        w_CV = x_CV - target_CV
        exp_CV = x_CV.exp_()
        weighted = (w_CV.mul_(exp_CV).sum(-1), gap_CV.mul_(exp_CV).sum(-1))
        return torch.stack((max_C, exp_CV.sum(-1), *weighted))[None]

    def extrapolated_gradient(
        self, logits: list[Tensor], scalars: TargetScalars, state: tuple[Tensor, ...], out_CV: Tensor
    ) -> None:
        max_C, sum_C, mean_C = state
        target_CV = logits[1] if len(logits) == 2 else target_and_gap(logits[1], logits[2], scalars)[0]
        x_CV = logits[0] - max_C[:, None]
        w_CV = (x_CV - target_CV).sub_(mean_C[:, None])
        out_CV.copy_(w_CV.mul_(x_CV.exp_().div_(sum_C[:, None])))

    def token_kl_sums(self, p_CV: Tensor, q_CV: Tensor, from_other: bool) -> Tensor:
        (max_C, x_CV), (other_max_C, y_CV) = _shifted(p_CV), _shifted(q_CV)
        exp_CV, other_exp_CV = x_CV.exp(), y_CV.exp()
        sums = exp_CV.sum(-1), other_exp_CV.sum(-1)
        weighted_C = (x_CV - y_CV).mul_(other_exp_CV if from_other else exp_CV).sum(-1)
        return torch.stack((max_C, sums[0], weighted_C, other_max_C, sums[1]))[None]

    def token_kl_gradient(
        self, p_CV: Tensor, q_CV: Tensor, state: tuple[Tensor, ...], from_other: bool, out_CV: Tensor
    ) -> None:
        max_C, sum_C, mean_C, other_max_C, other_sum_C = state
        if from_other:
            out_CV.copy_(_probabilities(p_CV, max_C, sum_C) - _probabilities(q_CV, other_max_C, other_sum_C))
            return
        x_CV = p_CV - max_C[:, None]
        gap_CV = (x_CV - (q_CV - other_max_C[:, None])).sub_(mean_C[:, None])
        out_CV.copy_(gap_CV.mul_(x_CV.exp_().div_(sum_C[:, None])))
