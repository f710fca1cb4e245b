"""Direct preference optimisation (paper Eq. 4), averaged over pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aligndistil.types import LossOutput


def dpo_loss(logprob_N: Tensor, reference_logprob_N: Tensor, beta: float, label_smoothing: float) -> LossOutput:
    """The loss of P pairs, whose sequences stand as chosen, rejected, chosen, rejected, …

    Args:
        logprob_N: summed response log-probs under the policy [N].
        reference_logprob_N: the same under the reference [N].
        beta: β₀, nats of reward for a nat of log-ratio.
        label_smoothing: probability that a label is flipped; 0 is Eq. 4.
    """
    reward_P2 = beta * (logprob_N - reference_logprob_N).view(-1, 2)
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    loss_P = -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)
    pairs = margin_P.numel()
    reported = {
        "reward_margin": margin_P,
        "reward_accuracy": (margin_P > 0).to(margin_P.dtype),
        "chosen_reward": reward_P2[:, 0],
        "rejected_reward": reward_P2[:, 1],
    }
    count = torch.tensor(float(pairs), device=margin_P.device)
    sums = {name: (value_P.detach().sum(), count) for name, value_P in reported.items()}
    return LossOutput(total=loss_P.sum(), count=pairs, sums=sums)
