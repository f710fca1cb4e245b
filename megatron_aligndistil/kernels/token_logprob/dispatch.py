"""The public op; the chunked form runs on every device."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.kernels.checks import check_rows
from megatron_aligndistil.kernels.token_logprob.chunked import LabelLogprob
from megatron_aligndistil.kernels.vocabulary_sweep import sweep
from megatron_aligndistil.types import VocabHead


def token_logprob(hidden_TH: Tensor, head: VocabHead, labels_T: Tensor, chunk_tokens: int) -> Tensor:
    """log softmax(z)[label] in nats, [T] float32 (float64 if an input is), differentiable in hidden_TH and head.weight.

    hidden_TH     [T, H], whole on each tensor-parallel rank; its gradient is this shard's part (see the package)
    labels_T      [T] int64 in [0, head.vocab_size)
    chunk_tokens  tokens whose logits exist at once
    One collective of 3 words a token forward, none backward.
    """
    check_rows(hidden_TH, head, chunk_tokens)
    if labels_T.shape != hidden_TH.shape[:1]:
        raise ValueError(f"labels {list(labels_T.shape)} for {hidden_TH.shape[0]} tokens")
    if bool(((labels_T < 0) | (labels_T >= head.vocab_size)).any()):
        raise ValueError(
            f"labels must be in [0, {head.vocab_size}), got {int(labels_T.min())} to {int(labels_T.max())}"
        )
    (logprob_T,) = sweep(hidden_TH, head, LabelLogprob(labels_T, head), chunk_tokens)
    return logprob_T
