"""Eq. 1 against a loop over pairs with its derivatives written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aligndistil.losses.reward_model import reward_model_loss

scores = st.floats(-20, 20)
pair_lists = st.lists(st.tuples(scores, scores), max_size=12)


def reference(pairs: list[tuple[float, float]], strength: float) -> tuple[float, list[float]]:
    """The sum over pairs, and its derivative for each score."""
    total, gradient = 0.0, []
    for chosen, rejected in pairs:
        total += math.log1p(math.exp(rejected - chosen)) + strength * (chosen + rejected) ** 2
        wrong = 1 / (1 + math.exp(chosen - rejected))
        pull = 2 * strength * (chosen + rejected)
        gradient += [pull - wrong, pull + wrong]
    return total, gradient


@settings(max_examples=200, deadline=None)
@given(pair_lists, st.sampled_from((0.0, 0.01, 1.0)))
def test_value_gradient_and_metrics_equal_the_loop(pairs: list[tuple[float, float]], strength: float) -> None:
    score_N = torch.tensor(pairs, dtype=torch.float64).flatten().requires_grad_()
    output = reward_model_loss(score_N, strength)
    (gradient_N,) = torch.autograd.grad(output.total, score_N)
    total, gradient = reference(pairs, strength)
    assert output.total.item() == pytest.approx(total, rel=1e-12, abs=1e-12)
    assert gradient_N.tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-12)
    assert output.count == len(pairs)
    expected = {
        "reward_margin": sum(chosen - rejected for chosen, rejected in pairs),
        "reward_accuracy": sum(chosen > rejected for chosen, rejected in pairs),
        "chosen_reward": sum(chosen for chosen, _ in pairs),
        "rejected_reward": sum(rejected for _, rejected in pairs),
    }
    assert output.sums.keys() == expected.keys()
    for name, (numerator, denominator) in output.sums.items():
        assert not numerator.requires_grad
        assert numerator.item() == pytest.approx(expected[name], rel=1e-12, abs=1e-11)
        assert denominator.item() == len(pairs)


def test_equal_rewards_cost_log_2_and_are_no_success() -> None:
    output = reward_model_loss(torch.zeros(2, dtype=torch.float64), 0.0)
    assert output.total.item() == pytest.approx(math.log(2), rel=1e-15)
    assert output.sums["reward_accuracy"][0] == 0


@pytest.mark.parametrize("shift", [-3.0, 5.0])
def test_only_the_regularisation_sees_the_level_of_rewards(shift: float) -> None:
    score_N = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    plain, moved = (reward_model_loss(score, 0.0).total for score in (score_N, score_N + shift))
    torch.testing.assert_close(moved, plain, rtol=1e-14, atol=0)
    assert reward_model_loss(score_N + shift, 0.1).total > reward_model_loss(score_N, 0.1).total


def test_far_apart_rewards_stay_finite() -> None:
    score_N = torch.tensor([-1e4, 1e4], requires_grad=True)
    output = reward_model_loss(score_N, 0.0)
    (gradient_N,) = torch.autograd.grad(output.total, score_N)
    assert output.total.item() == 2e4
    assert gradient_N.tolist() == [-1, 1]
