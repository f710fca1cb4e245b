"""What becomes of a rollout's samples, and how a rollout is saved."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_aligndistil.algorithms.algorithm import Trajectory
from megatron_aligndistil.rollout.engine import Request
from megatron_aligndistil.trainer.experience import with_values
from megatron_aligndistil.trainer.rollout_plan import CurrentRollout
from megatron_aligndistil.trainer.rollout_source import kept_examples, sample_metrics
from megatron_aligndistil.types import Example, Sample, Sequence


def sample(*tokens: int, reason: str = "stop") -> Sample:
    return Sample(np.array(tokens, np.int32), np.full(len(tokens), -0.5, np.float32), reason)


REQUESTS = [Request(np.array([7, 8], np.int32), seed) for seed in range(3)]


def test_an_empty_response_is_left_out_and_counted() -> None:
    samples = [sample(1, 2, 3), sample(), sample(4, reason="length")]
    examples, kept = kept_examples(REQUESTS, samples, ["a", "b", "c"])
    assert [example.origin for example in examples] == ["a", "c"]
    assert [example.sequences[0].tokens.tolist() for example in examples] == [[7, 8, 1, 2, 3], [7, 8, 4]]
    assert all(example.sequences[0].prompt_length == 2 for example in examples)
    statistics = [{"old_logprob": np.array([-0.5, -0.75, -0.5])}, {"old_logprob": np.array([-0.5])}]
    trajectories = [Trajectory(example, own) for example, own in zip(examples, statistics, strict=True)]
    metrics = sample_metrics(samples, trajectories, kept)
    assert metrics["rollout/responses"] == 3
    assert metrics["rollout/empty_skipped"] == 1
    assert metrics["rollout/response_tokens"] == pytest.approx(4 / 3)
    assert metrics["rollout/truncated_share"] == pytest.approx(1 / 3)
    assert metrics["rollout/sample_logprob_gap"] == pytest.approx(0.25 / 4)


def a_rollout(dtype: type) -> CurrentRollout:
    rng = np.random.default_rng(0)
    examples = []
    for i, (prompt, response) in enumerate([(1, 4), (3, 1), (2, 2)]):
        tokens = rng.integers(0, 99, prompt + response).astype(np.int32)
        values = {name: rng.standard_normal(response).astype(dtype) for name in ("advantage", "return")}
        examples.append(Example(f"file.jsonl:{i}, «quoted»", (Sequence(tokens, prompt),), values))
    return CurrentRollout(4, 9, examples, {"kl_coef": 0.1 + 0.2})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_saved_rollout_comes_back_to_the_bit(dtype: type) -> None:
    rollout = a_rollout(dtype)
    restored = CurrentRollout.restored(rollout.saved(unfinished=True))
    assert (restored.phase, restored.weights_step, restored.state) == (4, 9, {"kl_coef": 0.1 + 0.2})
    for own, back in zip(rollout.examples, restored.examples, strict=True):
        assert own.origin == back.origin
        assert own.sequences[0].prompt_length == back.sequences[0].prompt_length
        assert np.array_equal(own.sequences[0].tokens, back.sequences[0].tokens)
        for name, values in own.values.items():
            assert back.values[name].dtype == dtype
            assert np.array_equal(values, back.values[name])


def test_a_finished_rollout_is_saved_without_its_examples() -> None:
    restored = CurrentRollout.restored(a_rollout(np.float32).saved(unfinished=False))
    assert (restored.phase, restored.examples, restored.state) == (4, [], {"kl_coef": 0.1 + 0.2})


@pytest.mark.parametrize(("statistic", "expected"), [(np.float32, np.float32), (np.float64, np.float64)])
def test_values_have_the_type_of_the_statistics(statistic: type, expected: type) -> None:
    example = Example("a", (Sequence(np.arange(3, dtype=np.int32), 1),))
    trajectory = Trajectory(example, {"old_logprob": np.zeros(2, statistic)})
    (made,) = with_values([trajectory], [{"advantage": np.ones(2, np.float64)}])
    assert made.values["advantage"].dtype == expected
