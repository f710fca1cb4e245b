"""Supervised fine-tuning: the negative log-likelihood of response tokens, averaged over tokens."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.types import LossOutput


def supervised_loss(logprob_T: Tensor) -> LossOutput:
    """Minus the sum of the labels' log-probs [T]; the count is T tokens."""
    return LossOutput(total=-logprob_T.sum(), count=logprob_T.numel())
