"""The public op."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from megatron_aligndistil.kernels.backends.backend import statistic_dtype
from megatron_aligndistil.kernels.backends.choice import choose
from megatron_aligndistil.kernels.checks import check_rows, check_same_columns, check_same_rows
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_kl.chunked import TokenKL
from megatron_aligndistil.kernels.vocabulary_sweep import sweep
from megatron_aligndistil.types import VocabHead

Direction = Literal["to_other", "from_other"]


def token_kl(
    policy_hidden_TH: Tensor,
    policy_head: VocabHead,
    other_hidden_TH: Tensor,
    other_head: VocabHead,
    settings: KernelSettings,
    direction: Direction = "to_other",
) -> Tensor:
    """A KL divergence between two models' next tokens in nats, [T] float32 (float64 if a policy input is).

    policy_hidden_TH  [T, H], whole on each tensor-parallel rank; its gradient is this shard's part (see the package)
    other_hidden_TH   [T, H'] of the same tokens; gets no gradient, nor does its head
    direction         to_other: KL(pi_theta || pi_other), the reverse KL of distillation from pi_other; from_other:
                      KL(pi_other || pi_theta), TDPO's
    5 words a token cross the ranks in the forward pass, none in the backward pass.
    """
    if direction not in ("to_other", "from_other"):
        raise ValueError(f"direction must be 'to_other' or 'from_other', got {direction!r}")
    check_rows(policy_hidden_TH, policy_head)
    check_rows(other_hidden_TH, other_head)
    check_same_rows(policy_hidden_TH, other_hidden_TH)
    check_same_columns(policy_head, other_head)
    dtype = statistic_dtype(policy_hidden_TH, policy_head.weight)
    backend = choose(settings, (policy_hidden_TH, policy_head.weight, other_hidden_TH, other_head.weight))
    other = backend.product(other_hidden_TH, other_head, dtype)
    statistic = TokenKL(backend, other, from_other=direction == "from_other")
    (kl_T,) = sweep(policy_hidden_TH, policy_head, statistic, settings, dtype)
    return kl_T
