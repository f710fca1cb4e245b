"""KTO's loss written out, on the dense model (``dense_model``): float64, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_aligndistil.certificate.dense_model import Response, Shape, Weights, response_logprobs


@dataclass(frozen=True)
class KTO:
    """Settings, under the names of ``model.kto``."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


def kto(weights: Weights, reference: Weights, shape: Shape, labelled: list[tuple[Response, bool]], how: KTO) -> Tensor:
    """λ_D (1 - σ(β h - z₀)) or λ_U (1 - σ(z₀ - β h)) of every response, h = log π_θ(y|x)/π_ref(y|x)."""

    def log_ratio(response: Response) -> Tensor:
        return response_logprobs(weights, shape, response).sum() - response_logprobs(reference, shape, response).sum()

    responses = [response for response, _ in labelled]
    with torch.no_grad():
        kl = torch.stack([log_ratio(_answered(responses[i], responses[i - 1])) for i in range(len(responses))]).mean()
    z0 = how.beta * kl if kl > 0 else torch.zeros_like(kl)
    losses = []
    for response, desirable in labelled:
        reward = how.beta * log_ratio(response)
        value = torch.sigmoid(reward - z0) if desirable else torch.sigmoid(z0 - reward)
        losses.append((how.desirable_weight if desirable else how.undesirable_weight) * (1 - value))
    return torch.stack(losses)


def _answered(asked: Response, other: Response) -> Response:
    """The prompt of one with the response of another."""
    tokens = [*asked.tokens[: asked.prompt_length], *other.tokens[other.prompt_length :]]
    return Response(np.array(tokens), asked.prompt_length)
