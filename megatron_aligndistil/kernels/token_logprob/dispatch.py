"""The public ops."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.kernels.backends.backend import statistic_dtype
from megatron_aligndistil.kernels.backends.choice import choose
from megatron_aligndistil.kernels.checks import check_rows
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_logprob.chunked import LabelLogprob
from megatron_aligndistil.kernels.vocabulary_sweep import sweep
from megatron_aligndistil.types import VocabHead


def token_logprob(hidden_TH: Tensor, head: VocabHead, labels_T: Tensor, settings: KernelSettings) -> Tensor:
    """log softmax(z)[label] in nats, [T] float32 (float64 if an input is), differentiable in hidden_TH and head.weight.

    hidden_TH  [T, H], whole on each tensor-parallel rank; its gradient is this shard's part (see the package)
    labels_T   [T] int64 in [0, head.vocab_size)
    3 words a token cross the ranks in the forward pass, none in the backward pass.
    """
    (logprob_T,) = _run(hidden_TH, head, labels_T, settings, entropy=False)
    return logprob_T


def token_logprob_and_entropy(
    hidden_TH: Tensor, head: VocabHead, labels_T: Tensor, settings: KernelSettings
) -> tuple[Tensor, Tensor]:
    """``token_logprob``, and the entropy of softmax(z) in nats, detached. 4 words a token."""
    logprob_T, entropy_T = _run(hidden_TH, head, labels_T, settings, entropy=True)
    return logprob_T, entropy_T


def _run(
    hidden_TH: Tensor, head: VocabHead, labels_T: Tensor, settings: KernelSettings, entropy: bool
) -> tuple[Tensor, ...]:
    check_rows(hidden_TH, head)
    if labels_T.shape != hidden_TH.shape[:1]:
        raise ValueError(f"labels {list(labels_T.shape)} for {hidden_TH.shape[0]} tokens")
    if bool(((labels_T < 0) | (labels_T >= head.vocab_size)).any()):
        raise ValueError(
            f"labels must be in [0, {head.vocab_size}), got {int(labels_T.min())} to {int(labels_T.max())}"
        )
    statistic = LabelLogprob(choose(settings, (hidden_TH, head.weight)), labels_T, head, entropy)
    return sweep(hidden_TH, head, statistic, settings, statistic_dtype(hidden_TH, head.weight))
