"""Intervals against published values, exact distributions, and the properties that they must have."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_aligndistil.evaluation.intervals import bootstrap_mean, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, count: int, low: float, high: float) -> None:
    found = wilson(successes, count)
    assert found.value == successes / count
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_takes_half_successes_between_their_neighbours_and_is_symmetric() -> None:
    below, half, above = wilson(7, 20), wilson(7.5, 20), wilson(8, 20)
    assert below.low < half.low < above.low and below.high < half.high < above.high
    mirrored = wilson(12.5, 20)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((half.low, half.high), abs=1e-15)
    assert math.isnan(wilson(0, 0).value)


def test_the_bootstrap_is_seeded_and_has_the_width_of_the_means_distribution() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap_mean(values, 4000, seed=1)
    assert found == bootstrap_mean(values, 4000, seed=1) != bootstrap_mean(values, 4000, seed=2)
    error = 1.96 * values.std() / math.sqrt(values.size)
    assert found.value == values.mean()
    assert (found.low, found.high) == pytest.approx((found.value - error, found.value + error), abs=0.1 * error)


def test_the_bootstrap_of_many_values_is_that_of_all_samples_drawn_at_once() -> None:
    """Draws come in blocks where there are many values."""
    values = np.random.default_rng(0).normal(size=3_000_000)
    found = bootstrap_mean(values, 5, seed=3)
    generator = np.random.default_rng(3)
    means = [values[generator.integers(values.size, size=(1, values.size))].mean() for _ in range(5)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), rel=1e-12)


def test_too_few_values_have_no_interval() -> None:
    single, none = bootstrap_mean(np.array([2.0]), 10, 0), bootstrap_mean(np.array([]), 10, 0)
    assert single.value == 2.0 and math.isnan(single.low) and math.isnan(none.value)
