"""The losses of preference pairs against loops over pairs in float64, with their derivatives written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aligndistil.losses.dpo import dpo_loss
from megatron_aligndistil.losses.ipo import ipo_loss
from megatron_aligndistil.losses.simpo import simpo_loss
from megatron_aligndistil.losses.tdpo import tdpo1_loss, tdpo2_loss
from megatron_aligndistil.types import LossOutput

BETA, ALPHA, GAMMA, SMOOTHING = 0.3, 0.5, 0.7, 0.1


@dataclass(frozen=True)
class Response:
    logprob: float
    reference: float
    kl: float
    length: int


@dataclass(frozen=True)
class Expected:
    """Of a pair: the loss, its derivatives by (chosen log-prob, rejected log-prob, chosen KL, rejected KL), rewards."""

    loss: float
    derivatives: tuple[float, float, float, float]
    rewards: tuple[float, float]


responses = st.builds(Response, st.floats(-30, 0), st.floats(-30, 0), st.floats(0, 20), st.integers(1, 40))
pairs = st.lists(st.tuples(responses, responses), max_size=5)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logistic(margin: float, smoothing: float = 0.0) -> tuple[float, float]:
    """-(1 - ε) log σ(m) - ε log σ(-m) and its derivative by m."""
    loss = (1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * math.log1p(math.exp(margin))
    return loss, -(1 - smoothing) * sigmoid(-margin) + smoothing * sigmoid(margin)


def dpo_rewards(w: Response, loser: Response) -> tuple[float, float]:
    return BETA * (w.logprob - w.reference), BETA * (loser.logprob - loser.reference)


def dpo(w: Response, loser: Response, smoothing: float = 0.0) -> Expected:
    rewards = dpo_rewards(w, loser)
    loss, slope = logistic(rewards[0] - rewards[1], smoothing)
    return Expected(loss, (BETA * slope, -BETA * slope, 0, 0), rewards)


def cdpo(w: Response, loser: Response) -> Expected:
    return dpo(w, loser, SMOOTHING)


def tdpo1(w: Response, loser: Response) -> Expected:
    """The paper has u - δ, δ = β D(y_l) - β D(y_w)."""
    rewards = dpo_rewards(w, loser)
    loss, slope = logistic(rewards[0] - rewards[1] - (BETA * loser.kl - BETA * w.kl))
    return Expected(loss, (BETA * slope, -BETA * slope, BETA * slope, -BETA * slope), rewards)


def tdpo2(w: Response, loser: Response) -> Expected:
    """The paper has u - α δ₂, δ₂ = β D(y_l) - sg(β D(y_w))."""
    rewards = dpo_rewards(w, loser)
    loss, slope = logistic(rewards[0] - rewards[1] - ALPHA * (BETA * loser.kl - BETA * w.kl))
    return Expected(loss, (BETA * slope, -BETA * slope, 0, -ALPHA * BETA * slope), rewards)


def simpo(w: Response, loser: Response) -> Expected:
    rewards = BETA / w.length * w.logprob, BETA / loser.length * loser.logprob
    loss, slope = logistic(rewards[0] - rewards[1] - GAMMA)
    return Expected(loss, (BETA / w.length * slope, -BETA / loser.length * slope, 0, 0), rewards)


def ipo(w: Response, loser: Response) -> Expected:
    h_w, h_l = w.logprob - w.reference, loser.logprob - loser.reference
    off = h_w - h_l - 1 / (2 * BETA)
    return Expected(off**2, (2 * off, -2 * off, 0, 0), (BETA * h_w, BETA * h_l))


# From log-probs, the reference's, KLs and lengths [N].
Ours = Callable[[Tensor, Tensor, Tensor, Tensor], LossOutput]
METHODS: dict[str, tuple[Ours, Callable[[Response, Response], Expected]]] = {
    "dpo": (lambda own, ref, kl, length: dpo_loss(own, ref, BETA, 0.0), dpo),
    "cdpo": (lambda own, ref, kl, length: dpo_loss(own, ref, BETA, SMOOTHING), cdpo),
    "tdpo1": (lambda own, ref, kl, length: tdpo1_loss(own, ref, kl, BETA), tdpo1),
    "tdpo2": (lambda own, ref, kl, length: tdpo2_loss(own, ref, kl, BETA, ALPHA), tdpo2),
    "simpo": (lambda own, ref, kl, length: simpo_loss(own, length, BETA, GAMMA), simpo),
    "ipo": (lambda own, ref, kl, length: ipo_loss(own - ref, BETA), ipo),
}


def ours(name: str, rows: list[tuple[Response, Response]]) -> tuple[LossOutput, list[float], list[float]]:
    """The output, and its derivatives by log-probs and by KLs [N]."""
    sequences = [response for pair in rows for response in pair]

    def column(attribute: str) -> Tensor:
        return torch.tensor([getattr(sequence, attribute) for sequence in sequences], dtype=torch.float64)

    logprob_N, kl_N = column("logprob").requires_grad_(), column("kl").requires_grad_()
    output = METHODS[name][0](logprob_N, column("reference"), kl_N, column("length").long())
    by_logprob_N, by_kl_N = torch.autograd.grad(output.total, (logprob_N, kl_N), allow_unused=True)
    return output, by_logprob_N.tolist(), [0.0] * len(sequences) if by_kl_N is None else by_kl_N.tolist()


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=100, deadline=None)
@given(rows=pairs)
def test_value_gradient_and_metrics_equal_the_loop(name: str, rows: list[tuple[Response, Response]]) -> None:
    output, by_logprob, by_kl = ours(name, rows)
    expected = [METHODS[name][1](*pair) for pair in rows]
    assert output.count == len(rows)
    assert output.total.item() == pytest.approx(sum(pair.loss for pair in expected), rel=1e-11, abs=1e-11)
    derivatives = [pair.derivatives for pair in expected]
    assert by_logprob == pytest.approx([d for own in derivatives for d in own[:2]], rel=1e-11, abs=1e-11)
    assert by_kl == pytest.approx([d for own in derivatives for d in own[2:]], rel=1e-11, abs=1e-11)
    margins = [pair.rewards[0] - pair.rewards[1] for pair in expected]
    sums = {
        "chosen_reward": sum(pair.rewards[0] for pair in expected),
        "rejected_reward": sum(pair.rewards[1] for pair in expected),
        "reward_margin": sum(margins),
    }
    if name.startswith("tdpo"):
        sums |= {"chosen_kl": sum(w.kl for w, _ in rows), "rejected_kl": sum(loser.kl for _, loser in rows)}
    assert output.sums.keys() == {*sums, "reward_accuracy"}
    for metric, value in sums.items():
        assert output.sums[metric][0].item() == pytest.approx(value, rel=1e-9, abs=1e-9), metric
    assert all(not numerator.requires_grad and int(count) == len(rows) for numerator, count in output.sums.values())
    # Margins that rounding could turn over are for neither side to judge.
    if all(abs(margin) > 1e-9 for margin in margins):
        assert int(output.sums["reward_accuracy"][0]) == sum(margin > 0 for margin in margins)


def test_without_kls_tdpo_is_dpo() -> None:
    rows = [(Response(-3.0, -4.0, 0.0, 5), Response(-6.0, -5.0, 0.0, 2))]
    assert ours("tdpo1", rows)[0].total == ours("tdpo2", rows)[0].total == ours("dpo", rows)[0].total


def test_ipo_is_nothing_at_its_margin_and_grows_beyond() -> None:
    losses = [float(ipo_loss(torch.tensor([margin, 0.0]), beta=0.25).total) for margin in (1.0, 2.0, 3.0)]
    assert losses == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["dpo", "cdpo", "tdpo1", "tdpo2", "simpo"])
def test_far_margins_stay_finite_in_float32(name: str) -> None:
    logprob_N = torch.tensor([-1e4, 0.0, 0.0, -1e4], requires_grad=True)
    zeros_N, length_N = torch.zeros(4), torch.ones(4, dtype=torch.int64)
    output = METHODS[name][0](logprob_N, zeros_N, zeros_N, length_N)
    (gradient_N,) = torch.autograd.grad(output.total, logprob_N)
    assert output.total.isfinite() and output.total > 0.3 * 1e4 - 1
    assert gradient_N.isfinite().all() and gradient_N[0] < 0 < gradient_N[1]
