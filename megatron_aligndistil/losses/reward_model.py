"""Bradley–Terry reward modelling (paper Eq. 1), averaged over pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aligndistil.types import LossOutput


def reward_model_loss(score_N: Tensor, margin_regularisation: float) -> LossOutput:
    """-log σ(r_w - r_l) + λ (r_w + r_l)² of P pairs, whose sequences stand as chosen, rejected, chosen, rejected, …

    Args:
        score_N: scalar rewards r at the sequences' last tokens [N], nats: a difference is a log-odds.
        margin_regularisation: λ; holds the level of the rewards, which Eq. 1 leaves free, at zero. 0 is Eq. 1.
    """
    score_P2 = score_N.view(-1, 2)
    margin_P = score_P2[:, 0] - score_P2[:, 1]
    loss_P = -F.logsigmoid(margin_P) + margin_regularisation * score_P2.sum(1).square()
    pairs = margin_P.numel()
    reported = {
        "reward_margin": margin_P,
        "reward_accuracy": (margin_P > 0).to(margin_P.dtype),
        "chosen_reward": score_P2[:, 0],
        "rejected_reward": score_P2[:, 1],
    }
    count = torch.tensor(float(pairs), device=margin_P.device)
    sums = {name: (value_P.detach().sum(), count) for name, value_P in reported.items()}
    return LossOutput(total=loss_P.sum(), count=pairs, sums=sums)
