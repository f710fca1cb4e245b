"""Rewards, experience and losses of reinforcement learning: one response, one token at a time, float64.

Python numbers wherever no gradient flows. Like ``dense_model`` it shares no code with what it judges. Models go by
their names in ``models.ROLES``: "old" drew the responses and "old critic" valued them, "initial" is the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_aligndistil.certificate.dense_model import Response, Shape, Weights, response_logprobs, scalars

Models = Callable[[str], Weights]


def reward_model(
    weights: Weights, shape: Shape, pairs: list[tuple[Response, Response]], margin_regularisation: float
) -> Tensor:
    """Eq. 1 of every pair, with λ (r_w + r_l)² beside it."""
    losses = []
    for pair in pairs:
        chosen, rejected = (scalars(weights, shape, response.tokens)[-1] for response in pair)
        losses.append(
            -torch.log(torch.sigmoid(chosen - rejected)) + margin_regularisation * (chosen + rejected).square()
        )
    return torch.stack(losses)


@dataclass(frozen=True)
class PolicyGradient:
    """Settings of Eq. 42 (``sentence``) and of the token-level gradient of section 6.5."""

    sentence: bool
    beta0: float
    beta: float
    normalize_by_length: bool


def policy_gradient(
    weights: Weights, models: Models, shape: Shape, responses: list[Response], how: PolicyGradient
) -> Tensor:
    """-Σ_t r_t log π_θ(y_t) of every sequence, or with R = Σ_t r_t for each r_t, over |y| if asked for.

    Rewards are constants.
    """
    losses = []
    for response in responses:
        dpo, reverse, old = (_logprobs(models(role), shape, response) for role in ("dpo", "reverse", "old"))
        rewards = [how.beta0 * (dpo[t] - reverse[t]) - how.beta * (old[t] - dpo[t]) for t in range(_length(response))]
        if how.sentence:
            rewards = [math.fsum(rewards)] * len(rewards)
        logprobs = response_logprobs(weights, shape, response).unbind()
        total = torch.stack([-reward * logprob for reward, logprob in zip(rewards, logprobs, strict=True)]).sum()
        losses.append(total / len(rewards) if how.normalize_by_length else total)
    return torch.stack(losses)


@dataclass(frozen=True)
class PPO:
    """Settings of PPO, and of RTO where ``beta1`` isn't 0.

    reward  of whole responses: "model", the scalar at the last token; or "contrastive", Eq. 12 with ``beta0``
    """

    reward: str
    beta0: float
    reward_clip: float | None
    beta1: float
    kl_coef: float
    clip: float
    value_clip: float
    discount: float
    gae_lambda: float
    whiten_advantages: bool


@dataclass(frozen=True)
class Trajectory:
    """A response, and a number each of its tokens."""

    response: Response
    old_logprobs: list[float]
    old_values: list[float]
    advantages: list[float]
    returns: list[float]


def trajectory(models: Models, shape: Shape, response: Response, how: PPO) -> Trajectory:
    """Rewards, advantages A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} - V_{t+l}) and returns A + V, before whitening."""
    length = _length(response)
    old, initial = (_logprobs(models(role), shape, response) for role in ("old", "initial"))
    rewards = [-how.kl_coef * (old[t] - initial[t]) for t in range(length)]
    if how.beta1:
        dpo = _logprobs(models("dpo"), shape, response)
        rewards = [rewards[t] + how.beta1 * (dpo[t] - initial[t]) for t in range(length)]
    rewards[-1] += score(models, shape, response, how)
    values = [float(value) for value in _values(models("old critic"), shape, response)]
    ended = [*values, 0.0]  # nothing follows the last token
    deltas = [rewards[t] + how.discount * ended[t + 1] - values[t] for t in range(length)]
    decay = how.discount * how.gae_lambda
    advantages = [math.fsum(decay**i * deltas[t + i] for i in range(length - t)) for t in range(length)]
    returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
    return Trajectory(response, old, values, advantages, returns)


def score(models: Models, shape: Shape, response: Response, how: PPO) -> float:
    """The reward of a whole response."""
    if how.reward == "model":
        found = float(scalars(models("reward"), shape, response.tokens)[-1])
    else:
        dpo, reverse = (_logprobs(models(role), shape, response) for role in ("dpo", "reverse"))
        found = how.beta0 * math.fsum(d - r for d, r in zip(dpo, reverse, strict=True))
    return found if how.reward_clip is None else max(-how.reward_clip, min(how.reward_clip, found))


def whitened(rollout: list[Trajectory]) -> list[Trajectory]:
    """Advantages less their mean over the tokens, over √(variance + 1e-8), where the variance is the unbiased one."""
    everything = [advantage for own in rollout for advantage in own.advantages]
    mean = math.fsum(everything) / len(everything)
    variance = math.fsum((advantage - mean) ** 2 for advantage in everything) / (len(everything) - 1)
    scale = math.sqrt(variance + 1e-8)
    return [replace(own, advantages=[(a - mean) / scale for a in own.advantages]) for own in rollout]


def actor(weights: Weights, shape: Shape, rollout: list[Trajectory], how: PPO) -> Tensor:
    """-min(ρ A, clip(ρ, 1 ± ε) A), ρ = π_θ / π_old, of every token."""
    losses = []
    for own in rollout:
        logprobs = response_logprobs(weights, shape, own.response).unbind()
        for logprob, old, advantage in zip(logprobs, own.old_logprobs, own.advantages, strict=True):
            ratio = torch.exp(logprob - old)
            # Beyond the side on which a token's advantage pushes, its term is a constant.
            if advantage > 0 and ratio > 1 + how.clip:
                ratio = torch.full_like(ratio, 1 + how.clip)
            elif advantage < 0 and ratio < 1 - how.clip:
                ratio = torch.full_like(ratio, 1 - how.clip)
            losses.append(-ratio * advantage)
    return torch.stack(losses)


def critic(weights: Weights, shape: Shape, rollout: list[Trajectory], how: PPO) -> Tensor:
    """½ max((V - R)², (clip(V, V_old ± ε) - R)²) of every token."""
    losses = []
    for own in rollout:
        values = _values(weights, shape, own.response).unbind()
        for value, old, target in zip(values, own.old_values, own.returns, strict=True):
            loss = 0.5 * (value - target).square()
            change = float(value.detach()) - old
            if abs(change) > how.value_clip:
                held = 0.5 * (old + math.copysign(how.value_clip, change) - target) ** 2
                loss = torch.full_like(loss, held) if held > loss else loss
            losses.append(loss)
    return torch.stack(losses)


def distance_to_a_border(models: Models, shape: Shape, own: Trajectory, how: PPO) -> float:
    """How near a token is to where its gradient jumps: ρ to 1 ± ε, V to V_old ± ε, and R to halfway from there to V."""
    logprobs = _logprobs(models("policy"), shape, own.response)
    ratios = [math.exp(logprob - old) for logprob, old in zip(logprobs, own.old_logprobs, strict=True)]
    distances = [abs(abs(ratio - 1) - how.clip) for ratio in ratios]
    values = _values(models("critic"), shape, own.response).tolist()
    for value, old, target in zip(values, own.old_values, own.returns, strict=True):
        distances.append(abs(abs(value - old) - how.value_clip))
        if abs(value - old) > how.value_clip:
            halfway = (value + old + math.copysign(how.value_clip, value - old)) / 2
            distances.append(abs(target - halfway))
    return min(distances)


def _length(response: Response) -> int:
    return len(response.tokens) - response.prompt_length


def _logprobs(weights: Weights, shape: Shape, response: Response) -> list[float]:
    """Of a model that isn't trained here."""
    return [float(logprob) for logprob in response_logprobs(weights, shape, response)]


def _values(weights: Weights, shape: Shape, response: Response) -> Tensor:
    """Of the states in which the response tokens are chosen, [T]."""
    return scalars(weights, shape, response.tokens)[response.prompt_length - 1 : -1]
