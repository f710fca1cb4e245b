"""Direct preference optimisation (paper Eq. 4), averaged over pairs."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.losses.pairs import logistic_loss, margins, pair_output
from megatron_aligndistil.types import LossOutput


def dpo_loss(logprob_N: Tensor, reference_logprob_N: Tensor, beta: float, label_smoothing: float) -> LossOutput:
    """The loss of P pairs, whose sequences stand as chosen, rejected, chosen, rejected, …

    Args:
        logprob_N: summed response log-probs under the policy [N].
        reference_logprob_N: the same under the reference [N].
        beta: β₀, nats of reward for a nat of log-ratio.
        label_smoothing: probability that a label is flipped; 0 is Eq. 4, more is cDPO
            (https://ericmitchell.ai/cdpo.pdf).
    """
    reward_N = beta * (logprob_N - reference_logprob_N)
    return pair_output(logistic_loss(margins(reward_N), label_smoothing), reward_N)
