"""AlignDistil's objective (paper Eq. 17-19) from its per-token divergence, averaged over sequences."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.types import Batch, LossOutput


def token_weights(weight_T: Tensor, beta0: float, batch: Batch, normalize_by_length: bool) -> Tensor:
    """What a token's divergence counts in the sum over sequences [T]: β_t = β₀ / α_t, over |y| if asked for."""
    beta_T = beta0 / weight_T
    if not normalize_by_length:
        return beta_T
    return beta_T / batch.response_lengths[batch.response_sequence_ids]


def aligndistil_loss(kl_T: Tensor, token_weight_T: Tensor, sequences: int) -> LossOutput:
    """Σ_t weight_t · KL(π_θ ‖ π*)_t; the count is the number of sequences."""
    return LossOutput(total=(token_weight_T * kl_T).sum(), count=sequences)
