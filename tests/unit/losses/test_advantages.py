"""Token rewards, generalised advantages, whitening and the KL controller against their definitions, term by term."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aligndistil.losses.advantages import adapted_kl_coef, gae, token_rewards, whitened

numbers = st.floats(-10, 10)
tokens = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12)
plenty = settings(max_examples=200, deadline=None)
factors = st.one_of(st.sampled_from((0.0, 1.0)), st.floats(0, 1))


def close(actual: np.ndarray, expected: list[float]) -> None:
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@plenty
@given(tokens, factors, factors)
def test_gae_is_the_double_sum(rows: list[tuple[float, float]], discount: float, gae_lambda: float) -> None:
    rewards, values = [reward for reward, _ in rows], [value for _, value in rows] + [0.0]
    advantages_T, returns_T = gae(np.array(rewards), np.array(values[:-1]), discount, gae_lambda)
    expected = []
    for t in range(len(rows)):
        total = 0.0
        for later in range(t, len(rows)):
            delta = rewards[later] + discount * values[later + 1] - values[later]
            total += (discount * gae_lambda) ** (later - t) * delta
        expected.append(total)
    close(advantages_T, expected)
    close(returns_T, [a + v for a, v in zip(expected, values, strict=False)])


@plenty
@given(tokens)
def test_without_discount_the_advantage_is_the_return_to_go_minus_the_value(rows: list[tuple[float, float]]) -> None:
    rewards_T, values_T = np.array(rows).T
    advantages_T, returns_T = gae(rewards_T, values_T, 1.0, 1.0)
    to_go = [math.fsum(rewards_T[t:]) for t in range(len(rows))]
    close(returns_T, to_go)
    close(advantages_T, [g - v for g, v in zip(to_go, values_T, strict=True)])


@plenty
@given(tokens)
def test_lambda_zero_is_the_one_step_error_and_exact_values_leave_no_advantage(rows: list[tuple[float, float]]) -> None:
    rewards_T, values_T = np.array(rows).T
    advantages_T, _ = gae(rewards_T, values_T, 0.9, 0.0)
    expected = []
    for t, (reward, value) in enumerate(rows):
        expected.append(reward + 0.9 * (rows[t + 1][1] if t + 1 < len(rows) else 0.0) - value)
    close(advantages_T, expected)
    to_go_T = np.cumsum(rewards_T[::-1])[::-1]
    np.testing.assert_allclose(gae(rewards_T, to_go_T, 1.0, 0.95)[0], 0, atol=1e-12)


def test_gae_of_one_token_and_of_none() -> None:
    advantages_T, returns_T = gae(np.array([2.0]), np.array([0.5]), 0.7, 0.3)
    assert (advantages_T.tolist(), returns_T.tolist()) == ([1.5], [2.0])
    advantages_T, returns_T = gae(np.empty(0), np.empty(0), 1.0, 0.95)
    assert (advantages_T.shape, returns_T.shape) == ((0,), (0,))


@plenty
@given(tokens, numbers, st.floats(0, 1), st.booleans())
def test_token_rewards_are_penalty_bonus_and_a_last_score(
    rows: list[tuple[float, float]], score: float, kl_coef: float, with_bonus: bool
) -> None:
    kl_T, bonus_T = np.array(rows).T
    before = kl_T.copy(), bonus_T.copy()
    actual_T = token_rewards(score, bonus_T if with_bonus else None, kl_T, kl_coef)
    expected = []
    for t, (kl, bonus) in enumerate(rows):
        reward = -kl_coef * kl + (bonus if with_bonus else 0.0)
        expected.append(reward + score if t == len(rows) - 1 else reward)
    close(actual_T, expected)
    np.testing.assert_array_equal(before, (kl_T, bonus_T))


def test_token_rewards_are_float64_of_float32_statistics() -> None:
    kl_T = np.array([0.1, 0.2], np.float32)
    close(token_rewards(1.0, kl_T, kl_T, 0.5), [0.5 * float(kl_T[0]), 0.5 * float(kl_T[1]) + 1.0])


@plenty
@given(st.lists(st.lists(numbers, min_size=1, max_size=9), min_size=1, max_size=6))
def test_whitening_is_over_all_tokens(responses: list[list[float]]) -> None:
    every = [x for response in responses for x in response]
    actual = whitened([np.array(response) for response in responses])
    mean, variance = math.fsum(every) / len(every), statistics.variance(every) if len(every) > 1 else 0.0
    assert [len(x_T) for x_T in actual] == [len(response) for response in responses]
    flat = np.concatenate(actual)
    np.testing.assert_allclose(flat, [(x - mean) / math.sqrt(variance + 1e-8) for x in every], rtol=1e-10, atol=1e-10)
    if variance > 1e-2:
        assert flat.mean() == pytest.approx(0, abs=1e-12)
        assert torch.tensor(flat).std().item() == pytest.approx(1, abs=1e-6)  # eps / (2 var)


def test_whitening_of_equal_advantages_of_one_token_and_of_nothing() -> None:
    assert [x_T.tolist() for x_T in whitened([np.full(2, 3.0), np.full(1, 3.0)])] == [[0, 0], [0]]
    assert [x_T.tolist() for x_T in whitened([np.array([7.0])])] == [[0]]
    assert whitened([]) == []
    assert [x_T.shape for x_T in whitened([np.empty(0)])] == [(0,)]


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (7.2, 1.02), (60.0, 1.02), (0.0, 0.98), (-1.0, 0.98)],
)
def test_the_coefficient_moves_with_the_error_up_to_a_fifth(kl: float, factor: float) -> None:
    assert adapted_kl_coef(0.05, kl, 6.0, 1000, 10000) == pytest.approx(0.05 * factor, rel=1e-12)
