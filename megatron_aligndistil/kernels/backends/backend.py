"""What a backend offers: head products, and the elementwise sweeps over their logits.

Shapes: T tokens, C tokens of one chunk, H hidden size, V columns of a tile, K words a token, N parts of a tile (words
come in parts where several threads made them).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_aligndistil.types import VocabHead


def statistic_dtype(*tensors: Tensor) -> torch.dtype:
    """What statistics are computed in: float64 if an operand is, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class HeadProduct(ABC):
    """Hidden states [T, H] and the true columns of a head's shard, multiplied tile by tile.

    Padding rows of the weight take no part: they are neither read nor given a gradient. bf16 logits rounded from the
    accumulator would move z* by 0.85 nat at alpha = 30 (METHOD, numerics), so logits come out in ``dtype``.
    """

    def __init__(self, hidden_TH: Tensor, head: VocabHead, dtype: torch.dtype) -> None:
        self.hidden_TH, self.dtype = hidden_TH.detach(), dtype
        self.weight_VH = head.weight.detach()[: head.valid_columns]
        self.padded_columns = head.weight.shape[0]
        self.temperature = head.temperature

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of the products' factors, and so of the logits' gradient."""
        return torch.promote_types(self.hidden_TH.dtype, self.weight_VH.dtype)

    def empty(self, tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Room for logits, or their gradient, [tokens, columns], in the backend's layout."""
        return self.hidden_TH.new_empty((tokens, columns), dtype=dtype)

    @abstractmethod
    def logits(self, rows: slice, columns: slice, out_CV: Tensor) -> None:
        """Writes the tile's logits, over the temperature."""

    @abstractmethod
    def add_hidden_gradient(self, gradient_CV: Tensor, columns: slice, out_CH: Tensor) -> None:
        """Adds g W to ``out_CH`` (``dtype``)."""

    @abstractmethod
    def add_weight_gradient(self, gradient_CV: Tensor, hidden_CH: Tensor, out_VH: Tensor) -> None:
        """Adds g' hidden to ``out_VH`` (``dtype``), the accumulator's rows of the tile."""


# (max, sum) of a chunk's whole softmax, [C] each. Not their log Z: its rounding, of numbers as large as the logits, is
# larger than a small TVD.
Softmax = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TargetScalars:
    """What makes the target of a chunk's teacher logits; [C] each: t = log pi_d + alpha (log pi_d - log pi_r)."""

    log_z_d: Tensor
    log_z_r: Tensor
    alpha: Tensor


def label_logits(logits_CV: Tensor, column_C: Tensor) -> Tensor:
    """The labels' logits [C], 0 where the tile doesn't hold them."""
    if not logits_CV.shape[1]:
        return logits_CV.new_zeros(column_C.shape)
    return logits_CV.gather(1, column_C.clamp(min=0)[:, None]).squeeze(1).where(column_C >= 0, 0.0)


def put_label_gradient(logits_CV: Tensor, column_C: Tensor, max_C: Tensor, sum_C: Tensor, out_CV: Tensor) -> None:
    """Writes 1 - pi over -pi at the labels. Anew, not onto -pi, which has been rounded to the type of ``out_CV``."""
    if not logits_CV.shape[1]:
        return
    index_C1, held_C = column_C.clamp(min=0)[:, None], column_C >= 0
    probability_C = (logits_CV.gather(1, index_C1).squeeze(1) - max_C).exp() / sum_C
    label_C = (1 - probability_C).to(out_CV.dtype).where(held_C, out_CV.gather(1, index_C1).squeeze(1))
    out_CV.scatter_(1, index_C1, label_C[:, None])


class Backend(ABC):
    """The sweeps. ``m`` is a maximum, x = z - m, e = exp(x), s = sum e; words are [N, K, C]."""

    # Leading logits tensors that extrapolated_gradient takes after extrapolated_sums ran on them.
    kept_of_extrapolation: int

    @abstractmethod
    def product(self, hidden_TH: Tensor, head: VocabHead, dtype: torch.dtype) -> HeadProduct:
        """The products of a head."""

    @abstractmethod
    def softmax_sums(self, logits_CV: Tensor) -> Tensor:
        """(m, s)."""

    @abstractmethod
    def label_sums(self, logits_CV: Tensor, column_C: Tensor, entropy: bool) -> Tensor:
        """(m, s, the label's logit, with ``entropy`` sum e x).

        ``column_C`` is -1 where the tile doesn't hold the label, whose logit is 0 then.
        """

    @abstractmethod
    def label_gradient(self, logits_CV: Tensor, column_C: Tensor, max_C: Tensor, sum_C: Tensor, out_CV: Tensor) -> None:
        """onehot(label) - exp(z - max) / sum."""

    @abstractmethod
    def total_variation(self, d_CV: Tensor, r_CV: Tensor, softmax_d: Softmax, softmax_r: Softmax) -> Tensor:
        """(1/2 sum |pi_d - pi_r|)."""

    @abstractmethod
    def target_sums(self, d_CV: Tensor, r_CV: Tensor, scalars: TargetScalars) -> Tensor:
        """(m, s) of t; the logits may be overwritten."""

    @abstractmethod
    def extrapolated_sums(self, p_CV: Tensor, d_CV: Tensor, r_CV: Tensor, scalars: TargetScalars) -> Tensor:
        """(m, s, sum e w, sum e D) with w = x - t, D = log pi_d - log pi_r; the teachers' logits may be overwritten."""

    @abstractmethod
    def extrapolated_gradient(
        self, logits: list[Tensor], scalars: TargetScalars, state: tuple[Tensor, ...], out_CV: Tensor
    ) -> None:
        """pi (w - mean) with the state (max, sum, mean). ``logits``: all three as the products made them, or the
        first ``kept_of_extrapolation`` as extrapolated_sums left them."""

    @abstractmethod
    def token_kl_sums(self, p_CV: Tensor, q_CV: Tensor, from_other: bool) -> Tensor:
        """(m, s, sum e (x - x'), m', s'), x' of q; from_other: weighted by e'."""

    @abstractmethod
    def token_kl_gradient(
        self, p_CV: Tensor, q_CV: Tensor, state: tuple[Tensor, ...], from_other: bool, out_CV: Tensor
    ) -> None:
        """pi (x - x' - mean), or pi - pi' with from_other, from the state (m, s, mean, m', s')."""
