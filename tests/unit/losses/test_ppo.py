"""The clipped surrogate and the clipped value loss against loops over tokens with their derivatives written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aligndistil.losses.ppo import ppo_policy_loss, value_loss
from megatron_aligndistil.types import LossOutput

CLOSE = {"rel": 1e-12, "abs": 1e-12}
numbers = st.floats(-5, 5, allow_subnormal=False)
log_ratios = st.floats(-1, 1)
clips = st.sampled_from((0.05, 0.2, 0.5))


def float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def columns(rows: list[tuple[float, ...]], width: int) -> list[Tensor]:
    return list(float64([x for row in rows for x in row]).view(-1, width).T.contiguous())


def reported(output: LossOutput) -> dict[str, float]:
    """The sums, once it is clear that all are over the tokens."""
    assert all(denominator.item() == output.count for _, denominator in output.sums.values())
    assert not any(numerator.requires_grad for numerator, _ in output.sums.values())
    return {name: numerator.item() for name, (numerator, _) in output.sums.items()}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(log_ratios, numbers, st.one_of(st.just(0.0), numbers)), max_size=12), clips)
def test_policy_loss_equals_the_loop(rows: list[tuple[float, ...]], clip: float) -> None:
    shift_T, old_T, advantage_T = columns(rows, 3)
    logprob_T, advantage_T = (old_T + shift_T).requires_grad_(), advantage_T.requires_grad_()
    output = ppo_policy_loss(logprob_T, old_T.requires_grad_(), advantage_T, clip)
    gradients = torch.autograd.grad(output.total, (logprob_T, old_T, advantage_T), allow_unused=True)

    total, gradient, ratios, bound, kl = 0.0, [], [], 0, 0.0
    for new, old, advantage in zip(logprob_T.tolist(), old_T.tolist(), advantage_T.tolist(), strict=True):
        ratio = math.exp(new - old)
        allowed = min(max(ratio, 1 - clip), 1 + clip)
        total -= min(ratio * advantage, allowed * advantage)
        binds = (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip)
        gradient.append(0.0 if binds else -advantage * ratio)
        ratios.append(ratio)
        bound += binds
        kl += ratio - 1 - (new - old)
    assert output.count == len(rows)
    assert output.total.item() == pytest.approx(total, **CLOSE)
    assert gradients[0].tolist() == pytest.approx(gradient, **CLOSE)
    assert gradients[1:] == (None, None)
    expected = {"ratio": sum(ratios), "clipped_share": bound, "approximate_kl": kl}
    assert reported(output) == pytest.approx(expected, **CLOSE)
    assert [x.item() for x in output.maxima.values()] == pytest.approx([max(ratios)] if rows else [], **CLOSE)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, numbers), max_size=12), clips)
def test_value_loss_equals_the_loop(rows: list[tuple[float, ...]], clip: float) -> None:
    value_T, old_T, return_T = (x_T.requires_grad_() for x_T in columns(rows, 3))
    output = value_loss(value_T, old_T, return_T, clip)
    gradients = torch.autograd.grad(output.total, (value_T, old_T, return_T), allow_unused=True)

    total, gradient, bound = 0.0, [], 0
    for value, old, goal in rows:
        allowed = min(max(value, old - clip), old + clip)
        binds = (allowed - goal) ** 2 > (value - goal) ** 2
        total += 0.5 * max((value - goal) ** 2, (allowed - goal) ** 2)
        if binds:
            gradient.append(0.0)
        elif allowed != value and (allowed - goal) ** 2 == (value - goal) ** 2:
            gradient.append(0.5 * (value - goal))  # a kink: the mean of both sides
        else:
            gradient.append(value - goal)
        bound += binds
    assert output.count == len(rows)
    assert output.total.item() == pytest.approx(total, **CLOSE)
    assert gradients[0].tolist() == pytest.approx(gradient, **CLOSE)
    assert gradients[1:] == (None, None)
    expected = {
        "value": sum(value for value, _, _ in rows),
        "return": sum(goal for _, _, goal in rows),
        "value_clipped_share": bound,
    }
    assert reported(output) == pytest.approx(expected, **CLOSE)
    assert output.maxima == {}


@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
def test_the_first_pass_has_ratio_one_and_the_plain_policy_gradient(advantage: float) -> None:
    logprob_T = float64([-0.3, -4.0, -1e-3]).requires_grad_()
    output = ppo_policy_loss(logprob_T, logprob_T, torch.full((3,), advantage, dtype=torch.float64), 0.2)
    (gradient_T,) = torch.autograd.grad(output.total, logprob_T)
    assert gradient_T.tolist() == [-advantage] * 3
    assert reported(output) == {"ratio": 3, "clipped_share": 0, "approximate_kl": 0}


@pytest.mark.parametrize(("log_ratio", "advantage", "clip"), [(0.0, 1.0, 0.0), (math.log(2), 3.0, 1.0)])
def test_a_ratio_exactly_at_the_clip_still_learns(log_ratio: float, advantage: float, clip: float) -> None:
    logprob_T, old_T = float64([log_ratio]).requires_grad_(), float64([0.0])
    ratio = logprob_T.exp().item()
    assert ratio == 1 + clip
    output = ppo_policy_loss(logprob_T, old_T, float64([advantage]), clip)
    (gradient_T,) = torch.autograd.grad(output.total, logprob_T)
    assert gradient_T.tolist() == [-advantage * ratio]
    assert reported(output)["clipped_share"] == 0


def test_a_value_exactly_at_the_clip_still_learns() -> None:
    value_T = float64([0.5, -0.5]).requires_grad_()
    output = value_loss(value_T, float64([0.0, 0.0]), float64([2.0, -3.0]), 0.5)
    (gradient_T,) = torch.autograd.grad(output.total, value_T)
    assert gradient_T.tolist() == [-1.5, 2.5]
    assert reported(output)["value_clipped_share"] == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(numbers, st.floats(-0.19, 0.19), numbers), min_size=1, max_size=12))
def test_no_value_within_the_clip_counts_as_clipped(rows: list[tuple[float, ...]]) -> None:
    """Rounding in V_old + (V - V_old) must not look like a clip."""
    old_T, shift_T, return_T = columns(rows, 3)
    assert reported(value_loss(old_T + shift_T, old_T, return_T, 0.2))["value_clipped_share"] == 0


def test_no_tokens_give_a_differentiable_zero() -> None:
    for loss in (ppo_policy_loss, value_loss):
        empty_T = float64([]).requires_grad_()
        output = loss(empty_T, float64([]), float64([]), 0.2)
        (gradient_T,) = torch.autograd.grad(output.total, empty_T)
        assert (output.total.item(), output.count, output.maxima) == (0, 0, {})
        assert gradient_T.shape == (0,)
        assert all(numerator == 0 and denominator == 0 for numerator, denominator in output.sums.values())
