"""Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, Eq. 6), averaged over pairs."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.losses.pairs import logistic_loss, margins, pair_output
from megatron_aligndistil.types import LossOutput


def simpo_loss(logprob_N: Tensor, length_N: Tensor, beta: float, gamma: float) -> LossOutput:
    """-log σ(β/|y_w| log π_θ(y_w) - β/|y_l| log π_θ(y_l) - γ) of P pairs, chosen and rejected in turn.

    The rewards reported are β/|y| log π_θ(y); their margin is without γ.

    Args:
        logprob_N: summed response log-probs under the policy [N].
        length_N: |y|, response tokens [N].
        beta: nats of reward for a nat a token.
        gamma: margin that the chosen response should have, nats of reward.
    """
    reward_N = beta * logprob_N / length_N
    return pair_output(logistic_loss(margins(reward_N) - gamma), reward_N)
