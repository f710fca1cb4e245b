"""A global batch's examples as the micro-batches of one data-parallel rank.

Shape legend: B rows, S positions of a row, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from megatron_aligndistil.config.base_schema import ModelConfig
from megatron_aligndistil.data.packing import deal, first_fit_decreasing, split_to_multiple
from megatron_aligndistil.data.records import Kind
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.types import IGNORED_SEQUENCE, Batch, Example, Sequence


@dataclass(frozen=True)
class MicroBatching:
    """How a rank's examples become micro-batches.

    batching      "bucketed": ``micro_batch_size`` examples of about one length, a row for each sequence;
                  "packed": one row of at most ``pack_length`` tokens (before padding) that holds whole examples
    pad_multiple  the padded length of rows is a multiple of it: sequence parallelism scatters positions over ranks
    n_multiple    the number of micro-batches is a multiple of it, and above 1 all of a rank have one shape:
                  the interleaved pipeline schedule needs both
    """

    batching: str
    micro_batch_size: int
    pack_length: int
    pad_multiple: int = 1
    n_multiple: int = 1

    def __post_init__(self) -> None:
        if self.batching not in ("bucketed", "packed"):
            raise ConfigError(f"model.data.batching={self.batching!r} is unknown; use bucketed or packed")
        if self.micro_batch_size < 1:
            raise ConfigError(f"model.micro_batch_size={self.micro_batch_size} must be at least 1")

    @classmethod
    def from_config(cls, model: ModelConfig, kind: Kind) -> MicroBatching:
        """The micro-batching of a run; a packed row's default length is the longest example that the limits allow."""
        sequences = 2 if kind == "preference" else 1
        context, tensor = model.context_parallel_size, model.tensor_model_parallel_size
        pad_multiple = (2 * context if context > 1 else 1) * (tensor if model.sequence_parallel else 1)
        interleaved = model.virtual_pipeline_model_parallel_size is not None
        return cls(
            batching=model.data.batching,
            micro_batch_size=model.micro_batch_size,
            pack_length=model.data.pack_length or sequences * model.encoder_seq_length,
            pad_multiple=pad_multiple,
            n_multiple=model.pipeline_model_parallel_size if interleaved else 1,
        )


def micro_batches(examples: Items[Example], data_rank: int, data_size: int, how: MicroBatching) -> list[Batch]:
    """The micro-batches of one data-parallel rank, a pure function of the global batch's ``examples``.

    Examples are dealt by length, so ranks have about equal work and counts that differ by one at most. The sequences
    2i and 2i + 1 of a micro-batch of pairs are a chosen and its rejected one. Longest first, so that a lack of memory
    shows at once. A rank without examples gets no micro-batch. Where fewer examples than ``n_multiple`` are left, empty
    micro-batches (no sequences, one row of padding) fill up.
    """
    mine = [examples[i] for i in deal([example.length for example in examples], data_size)[data_rank]]
    if not mine:
        return []
    lengths = [example.length for example in mine]
    packed = how.batching == "packed"
    if packed:
        _check_fit(mine, how.pack_length)
        groups = first_fit_decreasing(lengths, how.pack_length)
    else:
        size = how.micro_batch_size
        groups = [list(range(start, min(start + size, len(mine)))) for start in range(0, len(mine), size)]
    groups = split_to_multiple(groups, lengths, how.n_multiple)
    groups += [[] for _ in range(-len(groups) % how.n_multiple)]
    members = [[sequence for i in group for sequence in mine[i].sequences] for group in groups]
    sizes = [_size(sequences, packed, how.pad_multiple) for sequences in members]
    if how.n_multiple > 1:
        # The interleaved schedule sends tensors of one shape: its stages can't tell each other another.
        sizes = [(max(rows for rows, _ in sizes), max(length for _, length in sizes))] * len(sizes)
    collate = _packed if packed else _bucketed
    origins = [tuple(mine[i].origin for i in group) for group in groups]
    batches = [collate(sequences, size, names) for sequences, size, names in zip(members, sizes, origins, strict=True)]
    for batch, group in zip(batches, groups, strict=True):
        batch.values = _values([mine[i] for i in group] or mine[:1], bool(group))
        if mine[0].desirable is not None:
            batch.desirable = torch.tensor([mine[i].desirable for i in group], dtype=torch.bool)
    return batches


def _values(examples: Items[Example], filled: bool) -> dict[str, torch.Tensor]:
    """The examples' numbers a response token [T] under their names; of an empty micro-batch the names with T = 0."""
    joined = {name: np.concatenate([example.values[name] for example in examples]) for name in examples[0].values}
    return {name: torch.from_numpy(values if filled else values[:0]) for name, values in joined.items()}


def _size(sequences: list[Sequence], packed: bool, pad_multiple: int) -> tuple[int, int]:
    """(rows, padded length) of a micro-batch."""
    lengths = [sequence.length for sequence in sequences] or [1]
    if packed:
        return 1, _round_up(sum(lengths), pad_multiple)
    return len(lengths), _round_up(max(lengths), pad_multiple)


def _check_fit(examples: Items[Example], pack_length: int) -> None:
    longest = max(examples, key=lambda example: example.length)
    if longest.length > pack_length:
        raise ConfigError(
            f"model.data.pack_length={pack_length} is below the {longest.length} tokens of {longest.origin}; "
            "raise it, or lower model.encoder_seq_length"
        )


def _bucketed(sequences: list[Sequence], size: tuple[int, int], origins: tuple[str, ...]) -> Batch:
    """One row a sequence, right-padded."""
    columns = _Columns(*size)
    columns.position_ids[:] = np.arange(size[1])
    for row, sequence in enumerate(sequences):
        columns.write(sequence, row, 0, row)
    return columns.batch(sequences, origins)


def _packed(sequences: list[Sequence], size: tuple[int, int], origins: tuple[str, ...]) -> Batch:
    """One row that holds all sequences one after another; padding is a last piece of its own."""
    padded = size[1]
    bounds = np.cumsum([0, *(sequence.length for sequence in sequences)])
    columns = _Columns(1, padded)
    for i, sequence in enumerate(sequences):
        columns.write(sequence, 0, int(bounds[i]), i)
    if padded > bounds[-1]:
        columns.position_ids[0, bounds[-1] :] = np.arange(padded - bounds[-1])
        bounds = np.append(bounds, padded)
    batch = columns.batch(sequences, origins)
    batch.cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    batch.max_seqlen = int(np.diff(bounds).max())
    return batch


class _Columns:
    """The arrays of a ``Batch``, [B, S], all padding to begin with."""

    def __init__(self, rows: int, length: int) -> None:
        self.tokens, self.labels, self.position_ids = (np.zeros((rows, length), np.int64) for _ in range(3))
        self.loss_mask = np.zeros((rows, length), bool)
        self.sequence_ids = np.full((rows, length), IGNORED_SEQUENCE, np.int64)

    def write(self, sequence: Sequence, row: int, start: int, sequence_id: int) -> None:
        """Put a sequence at ``start`` of a row. The position before a response token predicts it."""
        end = start + sequence.length
        self.tokens[row, start:end] = sequence.tokens
        self.labels[row, start : end - 1] = sequence.tokens[1:]
        self.loss_mask[row, start + sequence.prompt_length - 1 : end - 1] = True
        self.position_ids[row, start:end] = np.arange(sequence.length)
        self.sequence_ids[row, start:end] = sequence_id

    def batch(self, sequences: list[Sequence], origins: tuple[str, ...]) -> Batch:
        response_lengths = [sequence.length - sequence.prompt_length for sequence in sequences]
        return Batch(
            tokens=torch.from_numpy(self.tokens),
            labels=torch.from_numpy(self.labels),
            loss_mask=torch.from_numpy(self.loss_mask),
            position_ids=torch.from_numpy(self.position_ids),
            sequence_ids=torch.from_numpy(self.sequence_ids),
            response_lengths=torch.tensor(response_lengths, dtype=torch.int64),
            origins=origins,
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
