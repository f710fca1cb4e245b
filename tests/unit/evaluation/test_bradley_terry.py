"""Bradley–Terry fits against a direct optimiser on the battles' own likelihood, written another way."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy.optimize import minimize

from megatron_aligndistil.evaluation import bradley_terry

M, N, K = 3, 40, 4
NEVER = 1e-9


def battles(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, int, float]]]:
    """Points, weights, features, and every single battle: model, question, result."""
    generator = np.random.default_rng(seed)
    single = []
    for model in range(M):
        for question in range(N):
            for _ in range(generator.integers(0, 3)):
                result = float(generator.choice([0.0, 0.5, 1.0], p=[0.5, 0.2, 0.3]))
                copies = 3 if result != 0.5 and generator.random() < 0.4 else 1
                single += [(model, question, result)] * copies
    points, weights = np.zeros((M, N)), np.zeros((M, N))
    for model, question, result in single:
        points[model, question] += result
        weights[model, question] += 1
    return points, weights, generator.normal(0.1, 0.3, (M, N, K)), single


def test_the_likelihoods_maximum_is_the_joint_fits() -> None:
    points, weights, _, single = battles(0)

    def surprise(ratings: np.ndarray) -> float:
        """Of ratings over the baseline's, which is 0."""
        total = 0.0
        for model, _, result in single:
            chance = 1 / (1 + math.exp(-ratings[model]))
            total -= result * math.log(chance) + (1 - result) * math.log(1 - chance)
        return total

    ratings = minimize(surprise, np.zeros(M), method="BFGS", options={"gtol": 1e-9}).x
    found = bradley_terry.win_rates(points, weights, 10, 0)
    np.testing.assert_allclose([own.value for own in found], 1 / (1 + np.exp(-ratings)), atol=1e-6)


def test_the_style_controlled_fit_is_the_penalised_optimum() -> None:
    """Upstream's: battles twice, the baseline as A, tie as a win and a loss, columns of ±ln 10, ½ ‖β‖²."""
    points, weights, features, single = battles(1)
    rows, wins = [], []
    for copy in range(2):
        for model, question, result in single:
            row = np.zeros(M + 1 + K)
            row[0], row[1 + model] = math.log(10), -math.log(10)
            row[M + 1 :] = -features[model, question]
            rows.append(row)
            wins.append(float(copy == 0) if result == 0.5 else 1.0 - result)
    x, y = np.array(rows), np.array(wins)
    x[:, M + 1 :] = (x[:, M + 1 :] - x[:, M + 1 :].mean(axis=0)) / x[:, M + 1 :].std(axis=0)

    def objective(at: np.ndarray) -> tuple[float, np.ndarray]:
        signs = np.where(y == 1, 1.0, -1.0)
        margins = signs * (x @ at)
        slopes = -signs / (1 + np.exp(margins))
        return float(np.log1p(np.exp(-margins)).sum() + at @ at / 2), x.T @ slopes + at

    best = minimize(objective, np.zeros(M + 1 + K), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    found = bradley_terry.style_controlled(points, weights, features, 20, 0)
    elo = 400 * best
    expected = [1 / (1 + 10 ** ((elo[0] - elo[1 + model]) / 400)) for model in range(M)]
    np.testing.assert_allclose([own.value for own in found.win_rates], expected, atol=1e-6)
    np.testing.assert_allclose(found.coefficients_K, best[M + 1 :], atol=1e-6)
    pool = np.array([features[model, question] for model, question, _ in single])
    np.testing.assert_allclose(found.means_K, pool.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found.deviations_K, pool.std(axis=0), atol=1e-12)
    for own in found.win_rates:
        assert own.low < own.value < own.high


def test_intervals_are_seeded() -> None:
    points, weights, features, _ = battles(2)
    for fit in (
        lambda seed: bradley_terry.win_rates(points, weights, 50, seed),
        lambda seed: bradley_terry.style_controlled(points, weights, features, 50, seed).win_rates,
    ):
        assert fit(3) == fit(3) and fit(3) != fit(4)


def test_a_model_that_wins_nothing_has_no_win_rate_and_no_divergence() -> None:
    points, weights, features, _ = battles(3)
    weights[1] += 1
    points[1], points[2] = 0.0, weights[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = bradley_terry.win_rates(points, weights, 50, 0)
        controlled = bradley_terry.style_controlled(points, weights, features, 50, 0).win_rates
    assert vars(plain[1]) == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert vars(plain[2]) == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert 0 < controlled[1].value < 0.02 and 0.98 < controlled[2].value < 1


def test_what_there_is_nothing_of_is_not_a_number() -> None:
    points, weights, features, _ = battles(4)
    points[0], weights[0] = 0.0, 0.0
    features[:] = 0.25  # all answers of the same style
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = bradley_terry.win_rates(points, weights, 20, 0)
        controlled = bradley_terry.style_controlled(points, weights, features, 20, 0)
    assert math.isnan(plain[0].value) and math.isnan(controlled.win_rates[0].value)
    np.testing.assert_array_equal(controlled.coefficients_K, 0.0)
    for with_style, without in zip(controlled.win_rates[1:], plain[1:], strict=True):
        assert with_style.value == pytest.approx(without.value, abs=0.01)  # the penalty's pull
    nothing = bradley_terry.style_controlled(0 * points, 0 * weights, features, 20, 0)
    assert all(math.isnan(own.value) for own in nothing.win_rates)


def test_intervals_cover() -> None:
    """Of 200 draws with both games of a question correlated, about 95 % of intervals hold the truth."""
    generator, truth, held = np.random.default_rng(5), 0.4, 0
    for seed in range(200):
        points = 2.0 * (generator.random(80) < truth)  # both games alike
        own = bradley_terry.ratio(points, np.full(80, 2.0), 400, seed)
        held += own.low - NEVER <= truth <= own.high + NEVER
    assert 180 <= held <= 198


def test_a_model_with_few_battles_has_the_interval_of_those() -> None:
    """Resamples without any of them say nothing of it; the penalty alone would put it in the middle."""
    generator = np.random.default_rng(3)
    points, weights = np.zeros((2, 500)), np.zeros((2, 500))
    points[0], weights[0] = generator.integers(0, 3, 500), 2.0
    points[1, :2] = weights[1, :2] = 2.0
    features = generator.normal(size=(2, 500, K))
    own = bradley_terry.style_controlled(points, weights, features, 200, 5).win_rates[1]
    assert own.low > 0.7 and own.low <= own.value <= own.high


def test_one_resample_that_misses_every_battle_gives_no_interval() -> None:
    points = np.zeros(500)
    points[:2] = 1.0
    seed = next(seed for seed in range(99) if np.random.default_rng(seed).integers(500, size=(1, 500)).min() > 1)
    own = bradley_terry.ratio(points, points, 1, seed)
    assert own.value == 1.0 and math.isnan(own.low) and math.isnan(own.high)
