"""The sampler is a pure function of seed and step, and an epoch shows no example twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aligndistil.data.sampler import BatchSampler
from megatron_aligndistil.errors import ConfigError

RECORDED = [[7, 3, 0, 1, 4, 2, 5, 6], [0, 5, 6, 4, 2, 1, 7, 3]]


@st.composite
def samplers(draw: st.DrawFn) -> BatchSampler:
    batch = draw(st.integers(1, 12))
    return BatchSampler(draw(st.integers(batch, 100)), batch, draw(st.integers(0, 2**40)), draw(st.booleans()))


@given(samplers(), st.integers(0, 5))
def test_an_epoch_shows_examples_once(sampler: BatchSampler, epoch: int) -> None:
    first = epoch * sampler.steps_per_epoch
    batches = [sampler.batch(step) for step in range(first, first + sampler.steps_per_epoch)]
    seen = np.concatenate(batches)
    assert all(len(batch) == sampler.global_batch_size for batch in batches)
    assert len(set(seen.tolist())) == len(seen) == sampler.n_examples - sampler.left_over
    assert seen.min() >= 0 and seen.max() < sampler.n_examples


@given(samplers(), st.integers(0, 200))
def test_a_step_does_not_depend_on_earlier_ones(sampler: BatchSampler, step: int) -> None:
    fresh = BatchSampler(sampler.n_examples, sampler.global_batch_size, sampler.seed, sampler.shuffle)
    for earlier in range(step):
        sampler.batch(earlier)
    assert np.array_equal(sampler.batch(step), fresh.batch(step))


def test_epochs_and_seeds_have_their_own_orders() -> None:
    orders = [BatchSampler(64, 64, seed).batch(epoch).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert BatchSampler(64, 64, 1, shuffle=False).batch(3).tolist() == list(range(64))


def test_the_order_is_the_same_on_every_machine() -> None:
    """Recorded once: a run resumed under another NumPy must go on with the same examples."""
    assert BatchSampler(8, 8, 1234).batch(0).tolist() == RECORDED[0]
    assert BatchSampler(8, 8, 1234).batch(1).tolist() == RECORDED[1]


def test_every_position_is_equally_likely() -> None:
    counts = np.zeros((6, 6), int)
    for epoch in range(6000):
        for position, index in enumerate(BatchSampler(6, 6, 7).batch(epoch)):
            counts[position, index] += 1
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 52.6  # 25 degrees of freedom: 0.1 %


def test_fewer_examples_than_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"model\.global_batch_size=8 is more than the 7 examples"):
        BatchSampler(7, 8, 0)


def test_the_line_says_what_is_left_over() -> None:
    assert BatchSampler(10, 4, 0).line() == "2 steps of 4 examples an epoch; 2 examples are left over in each"
    assert "left over" not in BatchSampler(8, 4, 0).line()
