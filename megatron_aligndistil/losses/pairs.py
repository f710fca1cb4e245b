"""What the preference losses share: P pairs, whose sequences stand as chosen, rejected, chosen, rejected, …"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aligndistil.types import LossOutput


def margins(values_N: Tensor) -> Tensor:
    """What the chosen responses have more of than the rejected ones, [P]."""
    values_P2 = values_N.view(-1, 2)
    return values_P2[:, 0] - values_P2[:, 1]


def logistic_loss(margin_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - ε) log σ(m) - ε log σ(-m), where a label is flipped with probability ε: [P]."""
    return -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)


def pair_output(loss_P: Tensor, reward_N: Tensor, **reported: Tensor) -> LossOutput:
    """The sum of the pairs' losses; the count is P pairs.

    Reported: ``chosen_reward``, ``rejected_reward``, their difference ``reward_margin``, ``reward_accuracy`` (the share
    of pairs where it is positive), and the means over pairs of what else is given.

    Args:
        loss_P: the losses [P].
        reward_N: the rewards that the loss implies [N].
        reported: name → [P].
    """
    reward_P2 = reward_N.view(-1, 2)
    margin_P = margins(reward_N)
    values = {
        "reward_margin": margin_P,
        "reward_accuracy": (margin_P > 0).to(margin_P.dtype),
        "chosen_reward": reward_P2[:, 0],
        "rejected_reward": reward_P2[:, 1],
        **reported,
    }
    pairs = margin_P.numel()
    count = torch.tensor(float(pairs), device=margin_P.device)
    sums = {name: (value_P.detach().sum(), count) for name, value_P in values.items()}
    return LossOutput(total=loss_P.sum(), count=pairs, sums=sums)
