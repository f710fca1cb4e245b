"""Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, Eq. 17), averaged over pairs."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.losses.pairs import margins, pair_output
from megatron_aligndistil.types import LossOutput


def ipo_loss(log_ratio_N: Tensor, beta: float) -> LossOutput:
    """(h(y_w) - h(y_l) - 1/(2β))² of P pairs, chosen and rejected in turn. The rewards reported are β h.

    Args:
        log_ratio_N: h = log π_θ(y)/π_ref(y), of a response or a token of it: nats [N].
        beta: the paper's τ; the larger, the smaller the margin of log-ratios that is aimed at.
    """
    return pair_output((margins(log_ratio_N) - 1 / (2 * beta)).square(), beta * log_ratio_N)
