"""Comparisons of answers against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_aligndistil.evaluation.answers import Answers, compare, mean_of_orders

SFT = Answers(np.array([4.0, 6.0, 8.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0]))
OURS = Answers(np.array([5.0, 6.0, 7.0, 8.0]), np.array([2.0, 2.0, 2.0, 5.0]))


def test_win_rates_are_against_the_baseline_with_ties_as_half() -> None:
    sft, ours = compare({"sft": SFT, "ours": OURS}, "sft", {}, samples=100, seed=0)
    assert sft.reward_win_rate is None and sft.ties is None
    assert ours.reward_win_rate is not None and ours.reward is not None
    assert ours.reward_win_rate.value == 2.5 / 4 and ours.ties == 1
    assert 0 <= ours.reward_win_rate.low < 2.5 / 4 < ours.reward_win_rate.high <= 1
    assert (ours.reward.value, ours.length.value) == (2.75, 6.5)
    assert ours.judge_win_rate is None and ours.unreadable is None


def test_without_rewards_only_lengths_are_told() -> None:
    rows = compare({"sft": Answers(SFT.lengths_P), "ours": Answers(OURS.lengths_P)}, "sft", {}, 10, 0)
    assert [(row.reward, row.reward_win_rate, row.length.value) for row in rows] == [(None, None, 5), (None, None, 6.5)]


def test_unreadable_verdicts_are_counted_and_count_for_nobody() -> None:
    verdicts = mean_of_orders([1.0, None, 1.0, None], [1.0, 0.0, 0.0, None])
    assert verdicts.unreadable == 3
    assert verdicts.won_P[:3].tolist() == [1.0, 0.0, 0.5] and math.isnan(verdicts.won_P[3])
    _, ours = compare({"sft": SFT, "ours": OURS}, "sft", {"ours": verdicts}, 50, 0)
    assert ours.judge_win_rate is not None
    assert (ours.judge_win_rate.value, ours.unreadable) == (0.5, 3)


def test_further_columns_are_means_over_prompts() -> None:
    kl = {"KL": {"ours": np.array([0.1, 0.2, 0.3, 0.4])}}
    sft, ours = compare({"sft": SFT, "ours": OURS}, "sft", {}, 50, 0, kl)
    assert not sft.others
    assert ours.others["KL"].value == pytest.approx(0.25)
