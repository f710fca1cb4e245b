"""A judge against people's labels: judges whose biases are known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_aligndistil.evaluation.agreement import Agreement, agreement

PAIRS = 400
rng = np.random.default_rng(0)
LONGER = rng.integers(-3, 4, PAIRS)  # 0 now and then


def figures(first_P: np.ndarray, second_P: np.ndarray) -> Agreement:
    return agreement(np.stack([first_P, second_P], axis=1).astype(float), LONGER, 200, 0)


def test_a_judge_like_people() -> None:
    found = figures(np.ones(PAIRS), np.ones(PAIRS))
    assert (found.agreement.value, found.prefers_first.value, found.consistent.value) == (1.0, 0.5, 1.0)
    assert found.length_bias.value == 0.0
    assert found.people_prefer_longer.value == pytest.approx((LONGER > 0).sum() / (LONGER != 0).sum())


def test_a_judge_that_takes_the_first() -> None:
    found = figures(np.ones(PAIRS), np.zeros(PAIRS))
    assert (found.agreement.value, found.prefers_first.value, found.consistent.value) == (0.5, 1.0, 0.0)
    assert found.prefers_longer.value == 0.5


def test_a_judge_that_takes_the_longer() -> None:
    verdicts = np.where(LONGER > 0, 1.0, np.where(LONGER < 0, 0.0, 0.5))
    found = figures(verdicts, verdicts)
    assert (found.agreement_longer.value, found.agreement_shorter.value) == (1.0, 0.0)
    assert (found.prefers_longer.value, found.prefers_first.value) == (1.0, 0.5)
    assert found.length_bias.value == pytest.approx(1.0 - found.people_prefer_longer.value)
    assert found.length_bias.low < found.length_bias.value < found.length_bias.high


def test_what_could_not_be_read_counts_for_nothing() -> None:
    first, second = np.ones(PAIRS), np.zeros(PAIRS)
    first[:50], second[20:80] = np.nan, np.nan
    found = figures(first, second)
    # 20 pairs with the second order alone (0), 30 with neither, 30 with the first alone (1), the others ½.
    assert (found.pairs, found.unreadable) == (PAIRS - 30, 110)
    assert found.agreement.value == pytest.approx((30 + 0.5 * (PAIRS - 80)) / (PAIRS - 30))
    assert found.prefers_first.value == 1.0  # of pairs with both
    nothing = figures(np.full(PAIRS, np.nan), np.full(PAIRS, np.nan))
    assert nothing.pairs == 0 and np.isnan(nothing.agreement.value)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        verdicts = generator.binomial(1, 0.7, (60, 1)).repeat(2, axis=1).astype(float)
        estimate = agreement(verdicts, np.ones(60), 400, seed).agreement
        inside += estimate.low <= 0.7 <= estimate.high
    assert 178 <= inside <= 199
