"""Accuracies and their differences against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_aligndistil.evaluation.reward_accuracy import accuracy, differences, rewards

LENGTHS = np.array([[4, 2], [3, 3], [5, 10], [2, 2]])
STATISTICS = {
    "reward_model": np.array([[1.0, 0.5], [2.0, 2.0], [-1.0, 0.0], [0.1, 0.0]]),
    "dpo": np.array([[-3.0, -5.0], [-4.0, -2.0], [-9.0, -20.0], [-1.0, -1.0]]),
    "reverse_dpo": np.array([[-4.0, -4.0], [-4.0, -3.0], [-8.0, -17.0], [-1.0, -2.0]]),
    "reference": np.array([[-3.5, -5.0], [-5.0, -2.0], [-9.5, -19.0], [-1.0, -1.0]]),
}


def test_rewards_are_those_of_the_equations() -> None:
    found = rewards(STATISTICS, LENGTHS, beta0=0.5, per_token=False)
    assert list(found) == ["reward model", "DPO reward", "contrastive reward"]
    assert found["reward model"].tolist() == STATISTICS["reward_model"].tolist()
    assert found["DPO reward"].tolist() == [[0.25, 0.0], [0.5, 0.0], [0.25, -0.5], [0.0, 0.0]]
    assert found["contrastive reward"].tolist() == [[0.5, -0.5], [0.0, 0.5], [-0.5, -1.5], [0.0, 0.5]]


def test_a_reward_without_its_models_has_no_row() -> None:
    some = {name: STATISTICS[name] for name in ("dpo", "reverse_dpo")}
    assert list(rewards(some, LENGTHS, 0.1, per_token=False)) == ["contrastive reward"]


def test_ties_count_as_half_and_are_told() -> None:
    values = rewards(STATISTICS, LENGTHS, 0.5, per_token=False)
    dpo = accuracy("DPO reward", values["DPO reward"])
    assert (dpo.share.value, dpo.ties, dpo.pairs) == (3.5 / 4, 1, 4)
    model = accuracy("reward model", values["reward model"])
    assert (model.share.value, model.ties) == (2.5 / 4, 1)


def test_per_token_divides_by_the_response_and_can_change_the_order() -> None:
    values = rewards(STATISTICS, LENGTHS, 0.5, per_token=True)
    per_token = values["contrastive reward, per token"]
    assert per_token[0].tolist() == [0.125, -0.25]
    assert per_token[2].tolist() == pytest.approx([-0.1, -0.15])
    assert values["reward model, per token"][3].tolist() == [0.05, 0.0]


def test_differences_are_paired() -> None:
    """The same pairs are right: the difference is exactly 0, though each accuracy has a wide interval."""
    values = rewards(STATISTICS, LENGTHS, 0.5, per_token=False)
    values = {"a": values["DPO reward"], "b": 2 * values["DPO reward"], "c": values["contrastive reward"]}
    same, other, _ = differences(values, samples=200, seed=0)
    assert (same.first, same.second) == ("b", "a")
    assert (same.value.value, same.value.low, same.value.high) == (0.0, 0.0, 0.0)
    # Right of a: 1, 1, 1, ½; of c: 1, 0, 1, 0.
    assert other.value.value == pytest.approx(-1.5 / 4)
    assert other.value.low < other.value.value < other.value.high


def test_per_token_rewards_are_compared_with_their_like() -> None:
    values = rewards(STATISTICS, LENGTHS, 0.5, per_token=True)
    found = {(d.first, d.second) for d in differences(values, 10, 0)}
    assert ("contrastive reward, per token", "contrastive reward") in found
    assert ("contrastive reward, per token", "DPO reward, per token") in found
    assert ("contrastive reward, per token", "DPO reward") not in found
    assert len(found) == 3 + 3 + 3
