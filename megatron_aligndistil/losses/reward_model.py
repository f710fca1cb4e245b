"""Bradley–Terry reward modelling (paper Eq. 1), averaged over pairs."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.losses.pairs import logistic_loss, margins, pair_output
from megatron_aligndistil.types import LossOutput


def reward_model_loss(score_N: Tensor, margin_regularisation: float) -> LossOutput:
    """-log σ(r_w - r_l) + λ (r_w + r_l)² of P pairs, whose sequences stand as chosen, rejected, chosen, rejected, …

    Args:
        score_N: scalar rewards r at the sequences' last tokens [N], nats: a difference is a log-odds.
        margin_regularisation: λ; holds the level of the rewards, which Eq. 1 leaves free, at zero. 0 is Eq. 1.
    """
    level_P = margin_regularisation * score_N.view(-1, 2).sum(1).square()
    return pair_output(logistic_loss(margins(score_N)) + level_P, score_N)
