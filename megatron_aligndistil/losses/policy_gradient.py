"""The scalar policy gradients (paper Eq. 42 and section 6.5), averaged over sequences.

With r_t = β₀ log π_d(y_t)/π_r(y_t) - β log π_θ(y_t)/π_d(y_t) and y drawn from π_θ, the advantage of token t is

- Σ_s r_s for the sentence-level gradient. Rewards before t drop out of its expectation, so it equals the gradient with
  the return to go Σ_{s ≥ t} r_s, which is the whole gradient of E[R].
- r_t for the token-level one. It leaves out what y_t does to later rewards, Σ_{s > t} r_s. Its expectation over y_t is
  minus the gradient of β KL(π_θ ‖ softmax(z_d + (β₀ / β)(z_d - z_r))): that of AlignDistil with constant weight β₀ / β,
  from one sampled token where AlignDistil sums over the vocabulary.

The latter equality needs weights that don't depend on y_t. 1 / |y| does, wherever a response may end at t or go on; it
keeps the equality for responses of one length only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.types import Batch, LossOutput


def length_weights(batch: Batch, normalize_by_length: bool) -> Tensor:
    """What a token counts in the sum over sequences, float64 [T]: 1, or 1 / |y| if asked for."""
    length_T = batch.response_lengths[batch.response_sequence_ids].double()
    return length_T.reciprocal() if normalize_by_length else torch.ones_like(length_T)


def policy_gradient_loss(logprob_T: Tensor, advantage_T: Tensor, token_weight_T: Tensor, sequences: int) -> LossOutput:
    """The surrogate -Σ_t w_t A_t log π_θ(y_t), of which only the gradient matters; the count is ``sequences``.

    Args:
        logprob_T: log π_θ of the response tokens, nats [T].
        advantage_T: A, units of reward [T]; no gradient flows through it.
        token_weight_T: w, such as ``length_weights`` [T]; no gradient either.
        sequences: how many the micro-batch holds.
    """
    factor_T = (token_weight_T * advantage_T).detach().to(logprob_T.dtype)
    return LossOutput(total=-(factor_T * logprob_T).sum(), count=sequences)
