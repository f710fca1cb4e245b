"""Mismatched prompts and responses, their mean log-ratio, and what a data set's source makes of them."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import pytest
import torch
from datasets import Dataset

from megatron_aligndistil.algorithms.algorithm import Estimate, Passes, Trajectory
from megatron_aligndistil.algorithms.kto import mean_log_ratio, mismatched
from megatron_aligndistil.data.collate import MicroBatching
from megatron_aligndistil.data.examples import ExampleSet
from megatron_aligndistil.data.sampler import BatchSampler
from megatron_aligndistil.parallel.groups import Axis
from megatron_aligndistil.trainer.experience import Estimator, Statistics
from megatron_aligndistil.trainer.source import DatasetSource
from megatron_aligndistil.types import Example, Sequence


def example(prompt: list[int], response: list[int], origin: str = "f:1") -> Example:
    return Example(origin, (Sequence(np.array(prompt + response, np.int32), len(prompt)),), desirable=True)


def test_each_prompt_gets_the_response_before_it() -> None:
    """Origins that repeat, as those of a pair's two responses do, are told apart."""
    made = mismatched([example([1, 2], [3]), example([4], [5, 6]), example([7], [8, 9, 10])], 4)
    assert [(e.sequences[0].tokens.tolist(), e.sequences[0].prompt_length) for e in made] == [
        ([1, 2, 8, 9], 2),  # cut to 4 tokens
        ([4, 3], 1),
        ([7, 5, 6], 1),
    ]
    assert len({e.origin for e in made}) == 3
    assert all(e.sequences[0].tokens.dtype == np.int32 for e in made)


def test_an_example_alone_has_no_mismatch_and_no_kl() -> None:
    assert mismatched([example([1], [2])], 9) == []
    assert mean_log_ratio([]) == 0.0


def test_the_mean_does_not_depend_on_the_order() -> None:
    ratios = [1e8, 0.1, -1e8, 0.3]
    made = [Trajectory(example([1], [2]), {"policy": np.array([r]), "reference": np.array([0.0])}) for r in ratios]
    assert mean_log_ratio(made) == mean_log_ratio(made[::-1]) == pytest.approx(0.1, rel=1e-15)


class CountedPasses:
    """Says of an example how many there are."""

    def statistics(self, examples: Items[Example], asked: Passes) -> list[Statistics]:
        return [{"number": np.array([len(examples)])} for _ in examples]


def test_every_global_batch_is_estimated_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # no runtime is installed here
    rows = Dataset.from_dict(
        {
            "origin": [f"f:{i}" for i in range(7)],
            "prompt": [[1]] * 7,
            "responses": [[[2] * (i + 1)] for i in range(7)],
            "desirable": [i % 2 == 0 for i in range(7)],
        }
    )
    estimate = Estimate(
        examples=lambda examples: examples[1:],
        constants=lambda found: {"n": sum(float(t.statistics["number"][0]) for t in found)},
    )
    data = ExampleSet(rows, "")
    estimator = Estimator(estimate, CountedPasses())  # type: ignore[arg-type]
    source = DatasetSource(
        data, data, BatchSampler(7, 4, 1), MicroBatching("bucketed", 1, 99), Axis(None, 0, 2), -1, estimator
    )
    batches = source.step(0)
    assert [batch.constants for batch in batches] == [{"n": 9.0}] * 2  # three passes over three; of four, two are ours
    assert source.metrics.keys() == {"estimate_seconds"}
    assert [[batch.constants["n"] for batch in share] for share in source.validation(0)] == [[9.0, 9.0], [4.0]]
    assert source.metrics == {}  # the step's phases are not the validation's
    labels = [(int(b.response_lengths[0]), b.desirable.tolist()) for b in batches if b.desirable is not None]
    assert labels == [(length, [length % 2 == 1]) for length, _ in labels] and len(labels) == 2
