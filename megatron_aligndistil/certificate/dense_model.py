"""An independent model and its losses: one process, float64, full vocabulary, one sequence at a time.

Written from the papers' formulas with plain autograd; it shares no code with what it judges. Weights go by their
Hugging Face names. A loss is returned as its terms, one for each of the units that it averages.

Shape legend: S positions, V vocabulary, H hidden size, A heads, G key-value groups, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aligndistil.certificate import formulas

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the reference must know of a model beside its weights."""

    layers: int
    heads: int
    groups: int
    head_dim: int
    eps: float
    theta: float


def logits(weights: Weights, shape: Shape, tokens: np.ndarray) -> Tensor:
    """Float64 logits [S, V] of one sequence."""
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return _hidden_states(weights, shape, tokens) @ head.T


def scalars(weights: Weights, shape: Shape, tokens: np.ndarray) -> Tensor:
    """What a head of one output says at every position of a sequence, float64 [S]."""
    return (_hidden_states(weights, shape, tokens) @ weights["score.weight"].T).squeeze(1)


def _hidden_states(weights: Weights, shape: Shape, tokens: np.ndarray) -> Tensor:
    """What the head is applied to, [S, H]."""
    embedding = weights["model.embed_tokens.weight"]
    x_SH = embedding[torch.from_numpy(tokens.astype(np.int64))]
    cos_SD, sin_SD = _rotation(len(tokens), shape)
    for index in range(shape.layers):
        layer = {k.split(f"layers.{index}.")[1]: v for k, v in weights.items() if f".layers.{index}." in k}
        x_SH = x_SH + _attention(_norm(x_SH, layer["input_layernorm.weight"], shape.eps), layer, shape, cos_SD, sin_SD)
        y_SH = _norm(x_SH, layer["post_attention_layernorm.weight"], shape.eps)
        gate, up = y_SH @ layer["mlp.gate_proj.weight"].T, y_SH @ layer["mlp.up_proj.weight"].T
        x_SH = x_SH + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    return _norm(x_SH, weights["model.norm.weight"], shape.eps)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _rotation(length: int, shape: Shape) -> tuple[Tensor, Tensor]:
    # Angles, cosines and sines are float32 in every implementation of these families; the rest is float64.
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / shape.theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().double(), angles.sin().double()


def _rotate(x_ASD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x_ASD.chunk(2, dim=-1)
    return x_ASD * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD


def _attention(x_SH: Tensor, layer: Weights, shape: Shape, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    def project(name: str, count: int) -> Tensor:
        y = x_SH @ layer[f"self_attn.{name}_proj.weight"].T
        if f"self_attn.{name}_proj.bias" in layer:
            y = y + layer[f"self_attn.{name}_proj.bias"]
        y = y.view(len(x_SH), count, shape.head_dim)
        if f"self_attn.{name}_norm.weight" in layer:
            y = _norm(y, layer[f"self_attn.{name}_norm.weight"], shape.eps)
        return y.transpose(0, 1)

    q_ASD = _rotate(project("q", shape.heads), cos_SD, sin_SD)
    k_GSD = _rotate(project("k", shape.groups), cos_SD, sin_SD)
    v_GSD = project("v", shape.groups)
    repeat = shape.heads // shape.groups
    k_ASD, v_ASD = k_GSD.repeat_interleave(repeat, 0), v_GSD.repeat_interleave(repeat, 0)
    scores_ASS = q_ASD @ k_ASD.transpose(1, 2) / math.sqrt(shape.head_dim)
    future = torch.ones(len(x_SH), len(x_SH), dtype=torch.bool).triu(1)
    mixed_ASD = scores_ASS.masked_fill(future, -math.inf).softmax(-1) @ v_ASD
    return mixed_ASD.transpose(0, 1).flatten(1) @ layer["self_attn.o_proj.weight"].T


@dataclass(frozen=True)
class Response:
    """A sequence and where its response starts."""

    tokens: np.ndarray
    prompt_length: int


def response_logits(weights: Weights, shape: Shape, response: Response) -> Tensor:
    """Logits at the positions that predict the response tokens."""
    return logits(weights, shape, response.tokens)[response.prompt_length - 1 : -1]


def response_logprobs(weights: Weights, shape: Shape, response: Response) -> Tensor:
    """Log-probs of the response tokens."""
    labels = torch.from_numpy(response.tokens[response.prompt_length :].astype(np.int64))
    return formulas.label_logprob(response_logits(weights, shape, response), labels)


def sft(weights: Weights, shape: Shape, responses: list[Response]) -> Tensor:
    """Negative log-likelihood of every response token."""
    return -torch.cat([response_logprobs(weights, shape, r) for r in responses])


@dataclass(frozen=True)
class Distillation:
    """Settings of Eq. 16-19."""

    reward: str
    weight: str
    alpha: float
    epsilon: float
    beta0: float
    tvd_scale: float
    normalize_by_length: bool


def aligndistil(
    weights: Weights, dpo_model: Weights, other: Weights, shape: Shape, responses: list[Response], how: Distillation
) -> Tensor:
    """Eq. 16-19 of every sequence (``other``: the reverse DPO model), or Eq. 11 where the reward is vanilla (π_ref)."""
    losses = []
    for response in responses:
        z_d = response_logits(dpo_model, shape, response).detach()
        z_o = response_logits(other, shape, response).detach()
        tvd = formulas.total_variation(z_d, z_o)
        alpha = formulas.token_alpha(how.weight == "adaptive", how.alpha, how.epsilon, how.tvd_scale, tvd)
        target = formulas.extrapolated(z_d if how.reward == "contrastive" else z_o, z_d, z_o, alpha)
        kl = formulas.kl(response_logits(weights, shape, response), target)
        total = (how.beta0 / alpha * kl).sum()
        losses.append(total / len(kl) if how.normalize_by_length else total)
    return torch.stack(losses)


def gradients(loss: Tensor, weights: Weights) -> Weights:
    """∂loss/∂weight by name."""
    names = sorted(weights)
    return dict(zip(names, torch.autograd.grad(loss, [weights[n] for n in names]), strict=True))
