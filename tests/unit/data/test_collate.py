"""Micro-batches hold every example once, with labels and masks that a direct construction gives too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aligndistil.config.base_schema import DataConfig, ModelConfig
from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.data.packing import deal, first_fit_decreasing, split_to_multiple
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.types import IGNORED_SEQUENCE, Batch, Example, Sequence

PACK_LENGTH = 64


def example(name: str, *lengths: tuple[int, int], first: int = 1) -> Example:
    """An example whose sequences have (prompt, response) ``lengths`` and distinct tokens from ``first`` on."""
    sequences = []
    for prompt, response in lengths:
        sequences.append(Sequence(np.arange(first, first + prompt + response, dtype=np.int32), prompt))
        first += prompt + response
    return Example(name, tuple(sequences))


@st.composite
def batches(draw: st.DrawFn) -> list[Example]:
    sizes = st.tuples(st.integers(1, 12), st.integers(1, 16))
    pairs = draw(st.booleans())
    n = draw(st.integers(1, 16))
    return [example(f"f:{i}", *(draw(sizes) for _ in range(1 + pairs)), first=1 + 100 * i) for i in range(n)]


@st.composite
def ways(draw: st.DrawFn) -> MicroBatching:
    return MicroBatching(
        batching=draw(st.sampled_from(["bucketed", "packed"])),
        micro_batch_size=draw(st.integers(1, 4)),
        pack_length=draw(st.integers(56, 100)),  # two sequences of 28 fit
        pad_multiple=draw(st.sampled_from([1, 2, 8])),
        n_multiple=draw(st.sampled_from([1, 2, 3])),
    )


def sequences_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(tokens, tokens under the mask as labels) of each sequence, read back from a micro-batch."""
    out = []
    for n in range(batch.n_sequences):
        here = batch.sequence_ids == n
        out.append((batch.tokens[here].tolist(), batch.labels[here & batch.loss_mask].tolist()))
    return out


@settings(max_examples=100, deadline=None)
@given(batches(), ways(), st.integers(1, 4))
def test_every_example_is_seen_once_and_rightly(examples: list[Example], how: MicroBatching, data_size: int) -> None:
    by_origin = {e.origin: e for e in examples}
    seen, per_rank = [], []
    for rank in range(data_size):
        mine = micro_batches(examples, rank, data_size, how)
        assert len(mine) % how.n_multiple == 0
        if how.n_multiple > 1:
            check_one_shape(mine, how)
        per_rank.append(sum(len(batch.origins) for batch in mine))
        for batch in mine:
            seen += batch.origins
            check_batch(batch, [by_origin[o] for o in batch.origins], how)
    assert sorted(seen) == sorted(by_origin)
    assert max(per_rank) - min(per_rank) <= 1


def check_one_shape(batches: list[Batch], how: MicroBatching) -> None:
    """All as large as the largest needs to be, and no larger."""
    assert len({batch.tokens.shape for batch in batches}) <= 1
    packed = how.batching == "packed"
    needs = []
    for batch in batches:
        lengths = [int((batch.sequence_ids == n).sum()) for n in range(batch.n_sequences)] or [1]
        needs.append((1, sum(lengths)) if packed else (len(lengths), max(lengths)))
    if batches:
        rows, length = batches[0].tokens.shape
        assert rows == max(rows for rows, _ in needs)
        assert 0 <= length - max(length for _, length in needs) < how.pad_multiple


def check_batch(batch: Batch, examples: list[Example], how: MicroBatching) -> None:
    sequences = [s for e in examples for s in e.sequences]
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.position_ids.shape
    assert batch.tokens.shape[1] % how.pad_multiple == 0
    expected = [(s.tokens.tolist(), s.tokens[s.prompt_length :].tolist()) for s in sequences]
    assert sequences_of(batch) == expected
    assert batch.response_lengths.tolist() == [len(labels) for _, labels in expected]
    for n, sequence in enumerate(sequences):
        here = batch.sequence_ids == n
        assert batch.position_ids[here].tolist() == list(range(sequence.length))
        assert batch.labels[here].tolist() == [*sequence.tokens[1:].tolist(), 0]
        assert not batch.loss_mask[here][-1] and not batch.loss_mask[here][: sequence.prompt_length - 1].any()
    padding = batch.sequence_ids == IGNORED_SEQUENCE
    assert not batch.loss_mask[padding].any() and not batch.tokens[padding].any() and not batch.labels[padding].any()
    if how.batching == "packed":
        check_pieces(batch, sequences, how)
    else:
        assert batch.cu_seqlens is None and batch.max_seqlen == 0
        assert len(examples) <= how.micro_batch_size
        if how.n_multiple == 1:
            assert batch.tokens.shape[0] == len(sequences)
            assert batch.tokens.shape[1] - max(s.length for s in sequences) < how.pad_multiple


def check_pieces(batch: Batch, sequences: list[Sequence], how: MicroBatching) -> None:
    assert batch.tokens.shape[0] == 1 and batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
    total = sum(s.length for s in sequences)
    assert total <= how.pack_length
    if how.n_multiple == 1:
        assert batch.tokens.shape[1] - total < how.pad_multiple
    pieces = batch.cu_seqlens.diff().tolist()
    lengths = [s.length for s in sequences]
    assert pieces[: len(lengths)] == lengths and len(pieces) - len(lengths) in (0, 1) and all(pieces)
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.tokens.shape[1]
    assert batch.max_seqlen == max(pieces)


@settings(max_examples=50, deadline=None)
@given(batches(), ways(), st.integers(1, 4))
def test_sums_by_sequence_are_those_of_the_responses(
    examples: list[Example], how: MicroBatching, data_size: int
) -> None:
    """The value of a position is its label here."""
    for rank in range(data_size):
        for batch in micro_batches(examples, rank, data_size, how):
            sums = batch.sum_by_sequence(batch.response_labels.double())
            chosen = {e.origin: [float(s.tokens[s.prompt_length :].sum()) for s in e.sequences] for e in examples}
            assert sums.tolist() == [total for origin in batch.origins for total in chosen[origin]]


def test_a_small_batch_by_hand() -> None:
    pair = Example("f:1", (Sequence(np.array([5, 6, 7, 8], np.int32), 2), Sequence(np.array([5, 6, 9], np.int32), 2)))
    (bucketed,) = micro_batches([pair], 0, 1, MicroBatching("bucketed", 1, PACK_LENGTH, pad_multiple=3))
    assert bucketed.tokens.tolist() == [[5, 6, 7, 8, 0, 0], [5, 6, 9, 0, 0, 0]]
    assert bucketed.labels.tolist() == [[6, 7, 8, 0, 0, 0], [6, 9, 0, 0, 0, 0]]
    assert bucketed.loss_mask.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert bucketed.sequence_ids.tolist() == [[0, 0, 0, 0, -1, -1], [1, 1, 1, -1, -1, -1]]
    (packed,) = micro_batches([pair], 0, 1, MicroBatching("packed", 1, PACK_LENGTH, pad_multiple=4))
    assert packed.tokens.tolist() == [[5, 6, 7, 8, 5, 6, 9, 0]]
    assert packed.labels.tolist() == [[6, 7, 8, 0, 6, 9, 0, 0]]
    assert packed.loss_mask.int().tolist() == [[0, 1, 1, 0, 0, 1, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert packed.sequence_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1]]
    assert packed.cu_seqlens is not None and packed.cu_seqlens.tolist() == [0, 4, 7, 8] and packed.max_seqlen == 4
    assert packed.response_lengths.tolist() == bucketed.response_lengths.tolist() == [2, 1]


def test_a_rank_without_examples_gets_no_micro_batch() -> None:
    how = MicroBatching("bucketed", 2, PACK_LENGTH, n_multiple=2)
    only = [example("f:1", (2, 3))]
    assert micro_batches(only, 1, 2, how) == []
    filled = micro_batches(only, 0, 2, how)
    assert [batch.n_sequences for batch in filled] == [1, 0] and filled[1].origins == ()
    assert filled[1].sum_by_sequence(torch.ones(0)).shape == (0,)


def test_an_example_longer_than_a_pack() -> None:
    with pytest.raises(ConfigError, match=r"model\.data\.pack_length=9 is below the 10 tokens of f:2"):
        micro_batches([example("f:1", (2, 3)), example("f:2", (4, 6))], 0, 1, MicroBatching("packed", 1, 9))


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 8))
def test_dealing_is_even(lengths: list[int], hands: int) -> None:
    dealt = deal(lengths, hands)
    assert sorted(i for hand in dealt for i in hand) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in hand) for hand in dealt]
    if len(lengths) % hands == 0 and lengths:
        assert max(sums) - min(sums) <= max(lengths) - min(lengths)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 6))
def test_bins(lengths: list[int], multiple: int) -> None:
    bins = first_fit_decreasing(lengths, 50)
    assert all(0 < sum(lengths[i] for i in members) <= 50 for members in bins)
    assert len(bins) <= 11 / 9 * max(1, -(-sum(lengths) // 50)) * 2  # never near one bin an item where items are small
    assert not any(
        sum(lengths[i] for i in a + b) <= 50 for n, a in enumerate(bins) for b in bins[n + 1 :]
    )  # first fit leaves no two bins that fit into one
    split = split_to_multiple(bins, lengths, multiple)
    assert sorted(i for members in split for i in members) == list(range(len(lengths)))
    assert len(split) % multiple == 0 or all(len(members) == 1 for members in split)


def test_the_configured_way() -> None:
    model = ModelConfig(
        restore_from_path="x", micro_batch_size=3, encoder_seq_length=100, tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    assert MicroBatching.from_config(model, "preference") == MicroBatching("bucketed", 3, 200)
    model.sequence_parallel, model.virtual_pipeline_model_parallel_size = True, 2
    model.data = DataConfig(batching="packed", pack_length=300)
    assert MicroBatching.from_config(model, "demonstration") == MicroBatching("packed", 3, 300, 4, 2)
    with pytest.raises(ConfigError, match=r"model\.data\.batching='padded' is unknown"):
        MicroBatching("padded", 1, 10)
