"""The public op; the chunked form runs on every device."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.kernels.checks import check_rows, check_same_columns, check_same_rows
from megatron_aligndistil.kernels.head_product import HeadProduct, statistic_dtype
from megatron_aligndistil.kernels.token_kl.chunked import KLToOther
from megatron_aligndistil.kernels.vocabulary_sweep import sweep
from megatron_aligndistil.types import VocabHead


def token_kl(
    policy_hidden_TH: Tensor, policy_head: VocabHead, other_hidden_TH: Tensor, other_head: VocabHead, chunk_tokens: int
) -> Tensor:
    """KL(pi_theta || pi_other) in nats, [T] float32 (float64 if a policy input is).

    policy_hidden_TH  [T, H], whole on each tensor-parallel rank; its gradient is this shard's part (see the package)
    other_hidden_TH   [T, H'] of the same tokens; gets no gradient, nor does its head
    chunk_tokens      tokens whose logits exist at once
    One collective of 5 words a token forward, none backward.
    """
    check_rows(policy_hidden_TH, policy_head, chunk_tokens)
    check_rows(other_hidden_TH, other_head, chunk_tokens)
    check_same_rows(policy_hidden_TH, other_hidden_TH)
    check_same_columns(policy_head, other_head)
    dtype = statistic_dtype(policy_hidden_TH, policy_head.weight)
    other = HeadProduct(other_hidden_TH, other_head, dtype)
    (kl_T,) = sweep(policy_hidden_TH, policy_head, KLToOther(other), chunk_tokens)
    return kl_T
