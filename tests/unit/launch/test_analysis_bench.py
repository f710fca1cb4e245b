"""Samples of data sets, and pairs read as single sequences."""

from __future__ import annotations

import numpy as np

from megatron_aligndistil.launch.analysis_bench import Pairs, sampled
from megatron_aligndistil.types import Example, Sequence


class Rows:
    """Stands for an ExampleSet of pairs; counts what is read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, indices: np.ndarray) -> list[Example]:
        self.read += indices.tolist()
        return [Example(f"f:{i}", tuple(Sequence(np.array([i, side]), 1) for side in (0, 1))) for i in indices]


def test_samples_are_seeded_in_order_and_without_repeats() -> None:
    found = sampled(100, 10, seed=3)
    assert len(set(found.tolist())) == 10 and (np.diff(found) > 0).all()
    assert found.tolist() == sampled(100, 10, seed=3).tolist() != sampled(100, 10, seed=4).tolist()
    assert sampled(5, -1, 0).tolist() == sampled(5, 5, 0).tolist() == sampled(5, 9, 0).tolist() == [0, 1, 2, 3, 4]


def test_pairs_are_read_once_and_give_chosen_then_rejected() -> None:
    rows = Rows()
    pairs = Pairs(rows, np.array([7, 2, 9]))  # type: ignore[arg-type]
    assert len(pairs) == 6
    found = [example.sequences[0].tokens.tolist() for example in pairs.read(range(1, 6))]
    assert found == [[7, 1], [2, 0], [2, 1], [9, 0], [9, 1]]
    assert rows.read == [7, 2, 9]
