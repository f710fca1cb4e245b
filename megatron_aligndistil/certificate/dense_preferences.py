"""The losses of preference pairs written out, on the dense model (``dense_model``): float64, one sequence at a time.

A pair is (chosen, rejected).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_aligndistil.certificate import formulas
from megatron_aligndistil.certificate.dense_model import Response, Shape, Weights, response_logits, response_logprobs

Pairs = list[tuple[Response, Response]]


def _log_ratio(weights: Weights, reference: Weights, shape: Shape, response: Response) -> Tensor:
    """log π_θ(y|x)/π_ref(y|x)."""
    return response_logprobs(weights, shape, response).sum() - response_logprobs(reference, shape, response).sum()


def dpo(
    weights: Weights, reference: Weights, shape: Shape, pairs: Pairs, beta: float, smoothing: float = 0.0
) -> Tensor:
    """Eq. 4 of every pair, with label smoothing."""
    losses = []
    for chosen, rejected in pairs:
        h_w, h_l = (_log_ratio(weights, reference, shape, response) for response in (chosen, rejected))
        u = beta * (h_w - h_l)
        losses.append(-(1 - smoothing) * torch.log(torch.sigmoid(u)) - smoothing * torch.log(torch.sigmoid(-u)))
    return torch.stack(losses)


def tdpo(
    weights: Weights, reference: Weights, shape: Shape, pairs: Pairs, beta: float, alpha: float | None = None
) -> Tensor:
    """TDPO1 of every pair, or TDPO2 where there is an α."""
    losses = []
    for chosen, rejected in pairs:
        h_w, h_l = (_log_ratio(weights, reference, shape, response) for response in (chosen, rejected))
        kl_w, kl_l = (_sequential_kl(weights, reference, shape, response) for response in (chosen, rejected))
        u = beta * h_w - beta * h_l
        delta = beta * kl_l - beta * kl_w if alpha is None else alpha * (beta * kl_l - beta * kl_w.detach())
        losses.append(torch.log(1 + torch.exp(delta - u)))
    return torch.stack(losses)


def _sequential_kl(weights: Weights, reference: Weights, shape: Shape, response: Response) -> Tensor:
    """Σ_t KL(π_ref(·|x, y_<t) ‖ π_θ(·|x, y_<t))."""
    return formulas.kl(response_logits(reference, shape, response), response_logits(weights, shape, response)).sum()


def simpo(weights: Weights, shape: Shape, pairs: Pairs, beta: float, gamma: float) -> Tensor:
    """SimPO of every pair."""
    losses = []
    for chosen, rejected in pairs:
        mean_w, mean_l = (response_logprobs(weights, shape, response).mean() for response in (chosen, rejected))
        losses.append(torch.log(1 + torch.exp(gamma - beta * mean_w + beta * mean_l)))
    return torch.stack(losses)


def ipo(
    weights: Weights, reference: Weights, shape: Shape, pairs: Pairs, beta: float, normalize_by_length: bool
) -> Tensor:
    """IPO of every pair, of log-ratios a response or a token."""
    losses = []
    for pair in pairs:
        h_w, h_l = (
            _log_ratio(weights, reference, shape, r) / (len(r.tokens) - r.prompt_length if normalize_by_length else 1)
            for r in pair
        )
        losses.append((h_w - h_l - 1 / (2 * beta)) ** 2)
    return torch.stack(losses)
