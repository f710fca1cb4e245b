"""How a Hugging Face tensor is laid out in Megatron-Core's parameters, and back: five rules, all free of arithmetic.

Shape legend: R rank of the tensor-parallel group, N its size; rows are dimension 0, columns dimension 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Part(Protocol):
    """A Hugging Face tensor of which a slice can be read without the rest."""

    @property
    def shape(self) -> Shape: ...

    def take(self, dimension: int, start: int, stop: int) -> Tensor:
        """The slice ``start:stop`` along ``dimension`` (0 or 1)."""
        ...


@dataclass(frozen=True)
class MemoryPart:
    """A tensor in memory, of which slices are taken."""

    tensor: Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    def take(self, dimension: int, start: int, stop: int) -> Tensor:
        return self.tensor.narrow(dimension, start, stop - start)


@dataclass(frozen=True)
class Slot:
    """The parameter that a rank holds: its shape, and where the rank stands in its tensor-parallel group."""

    shape: Shape
    rank: int
    size: int
    query_groups: int  # of the whole model


@dataclass(frozen=True)
class Rule:
    """``split`` makes a rank's shard from the Hugging Face tensors; ``merge`` makes them from the shards of all ranks.

    ``merge`` takes the shards in rank order, the Hugging Face shapes and the model's query groups. A rule that is not
    ``sharded`` needs the first rank's shard only.
    """

    name: str
    split: Callable[[Sequence[Part], Slot], Tensor]
    merge: Callable[[Sequence[Tensor], Sequence[Shape], int], list[Tensor]]
    sharded: bool = True


def share(part: Part, slot: Slot, dimension: int) -> Tensor:
    """A rank's equal share of a tensor along ``dimension``."""
    width = part.shape[dimension] // slot.size
    return part.take(dimension, slot.rank * width, (slot.rank + 1) * width)


def _split_vocab(parts: Sequence[Part], slot: Slot) -> Tensor:
    rows, vocab_size = slot.shape[0], parts[0].shape[0]
    first = min(slot.rank * rows, vocab_size)
    real = parts[0].take(0, first, min(first + rows, vocab_size))
    return torch.nn.functional.pad(real, (0, 0, 0, rows - real.shape[0]))


def _split_qkv(parts: Sequence[Part], slot: Slot) -> Tensor:
    groups = slot.query_groups // slot.size
    shares = [share(part, slot, 0) for part in parts]
    return torch.cat([share.unflatten(0, (groups, -1)) for share in shares], dim=1).flatten(0, 1)


def _merge_qkv(shards: Sequence[Tensor], shapes: Sequence[Shape], query_groups: int) -> list[Tensor]:
    fused = torch.cat(list(shards)).unflatten(0, (query_groups, -1))
    pieces = fused.split([shape[0] // query_groups for shape in shapes], dim=1)
    return [piece.flatten(0, 1) for piece in pieces]


def _merge_gated(shards: Sequence[Tensor], shapes: Sequence[Shape], query_groups: int) -> list[Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[index] for half in halves]) for index in range(2)]


# Norms: the same on every rank.
REPLICATED = Rule(
    "replicated",
    split=lambda parts, slot: parts[0].take(0, 0, parts[0].shape[0]),
    merge=lambda shards, shapes, groups: [shards[0]],
    sharded=False,
)
# Input features over ranks.
ROW = Rule(
    "row",
    split=lambda parts, slot: share(parts[0], slot, 1),
    merge=lambda shards, shapes, groups: [torch.cat(list(shards), dim=1)],
)
# Vocabulary entries over ranks, zero rows behind the last one.
VOCAB = Rule(
    "vocab",
    split=_split_vocab,
    merge=lambda shards, shapes, groups: [torch.cat(list(shards))[: shapes[0][0]]],
)
# Query, key, value: [q heads of group 0, k 0, v 0, q heads of group 1, ...], groups over ranks; weights and biases.
QKV = Rule("qkv", split=_split_qkv, merge=_merge_qkv)
# Gate and up projection: each rank holds its rows of the gate above its rows of the up projection.
GATED = Rule(
    "gated",
    split=lambda parts, slot: torch.cat([share(part, slot, 0) for part in parts]),
    merge=_merge_gated,
)
