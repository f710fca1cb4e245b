"""KTO against a loop over responses in float64, with its derivatives written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aligndistil.losses.kto import KTOSettings, kto_loss

logprobs = st.floats(-30, 0)
responses = st.lists(st.tuples(logprobs, logprobs, st.booleans()), max_size=10)
weights = st.floats(0.1, 3)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@settings(max_examples=200, deadline=None)
@given(responses, st.floats(-20, 20), st.floats(0.05, 1), weights, weights)
def test_value_gradient_and_metrics_equal_the_loop(
    rows: list[tuple[float, float, bool]], kl: float, beta: float, lambda_d: float, lambda_u: float
) -> None:
    """In the paper's form: λ (1 - σ(±β (h - z₀'))), with the KL itself as the reference point."""
    policy_N, reference_N = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (0, 1))
    desirable_N = torch.tensor([row[2] for row in rows], dtype=torch.bool)
    policy_N.requires_grad_()
    output = kto_loss(policy_N, reference_N, desirable_N, kl, KTOSettings(beta, lambda_d, lambda_u))
    (gradient_N,) = torch.autograd.grad(output.total, policy_N)

    total, gradient = 0.0, []
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for policy, reference, desirable in rows:
        weight, sign = (lambda_d, 1) if desirable else (lambda_u, -1)
        value = sigmoid(sign * beta * (policy - reference - max(kl, 0)))
        total += weight * (1 - value)
        gradient.append(-weight * sign * beta * value * (1 - value))
        rewards[desirable].append(beta * (policy - reference))
    assert output.total.item() == pytest.approx(total, rel=1e-11, abs=1e-11)
    assert gradient_N.tolist() == pytest.approx(gradient, rel=1e-11, abs=1e-11)
    assert output.count == len(rows)
    expected = {
        "desirable_reward": (sum(rewards[True]), len(rewards[True])),
        "undesirable_reward": (sum(rewards[False]), len(rewards[False])),
        "kl_estimate": (kl * len(rows), len(rows)),
        "z0": (max(beta * kl, 0) * len(rows), len(rows)),
    }
    assert output.sums.keys() == expected.keys()
    for name, (numerator, denominator) in output.sums.items():
        assert not numerator.requires_grad
        assert (numerator.item(), denominator.item()) == pytest.approx(expected[name], rel=1e-11, abs=1e-11)


def test_a_policy_that_is_its_reference_pays_half_of_each_weight() -> None:
    zeros_N = torch.zeros(2, dtype=torch.float64)
    output = kto_loss(zeros_N, zeros_N, torch.tensor([True, False]), -1.0, KTOSettings(0.1, 1.0, 3.0))
    assert output.total.item() == 2.0


def test_far_log_ratios_keep_their_small_losses_in_float32() -> None:
    """1 - σ(40) would round to 0."""
    policy_N = torch.tensor([400.0, -400.0], requires_grad=True)
    output = kto_loss(policy_N, torch.zeros(2), torch.tensor([True, False]), 0.0, KTOSettings(0.1, 1.0, 1.0))
    (gradient_N,) = torch.autograd.grad(output.total, policy_N)
    assert output.total.item() == pytest.approx(2 * math.exp(-40), rel=1e-5)
    assert gradient_N.tolist() == pytest.approx([-0.1 * math.exp(-40), 0.1 * math.exp(-40)], rel=1e-5)
