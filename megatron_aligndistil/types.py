"""The few values that cross package borders.

Shape legend: B rows of a micro-batch, S positions of a row, N sequences of a micro-batch (a packed row holds
several), T selected tokens, H hidden size, V true vocabulary size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

IGNORED_SEQUENCE = -1


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """A row of a data set before tokenization.

    ``responses`` holds one response, or two where the row is a preference: (chosen, rejected).
    ``desirable`` is a single response's label, None where there is none.
    ``origin`` is ``file:row`` (or ``dataset:row``), the place that an error message names.
    """

    origin: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    desirable: bool | None = None


@dataclass(frozen=True)
class Sequence:
    """A tokenized prompt and response. ``tokens`` is int32 [length]; the response starts at ``prompt_length``."""

    tokens: np.ndarray
    prompt_length: int

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Sample:
    """A response that an engine has drawn. ``tokens`` is int32 [T], its end token included where it reached one.

    logprobs       float32 [T], nats, of the engine's own model at temperature 1, whatever was drawn from
    finish_reason  "stop" at an end token, "length" where the room for new tokens ended first
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Example:
    """What is never split over micro-batches: one sequence, or the (chosen, rejected) sequences of a pair.

    ``values`` are numbers a response token [T], over all its sequences in order, that an algorithm has computed once:
    log-probs under the policy that drew them, advantages, returns. ``desirable`` is an unpaired response's label.
    """

    origin: str
    sequences: tuple[Sequence, ...]
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    desirable: bool | None = None

    @property
    def length(self) -> int:
        """Tokens of all its sequences together."""
        return sum(sequence.length for sequence in self.sequences)


@dataclass
class Batch:
    """One micro-batch. Position t predicts token t + 1: ``labels`` and ``loss_mask`` are already shifted.

    tokens        [B, S] int64, right-padded
    labels        [B, S] int64, the next token; 0 where there is none
    loss_mask     [B, S] bool, true where the label is a response token (EOS included)
    position_ids  [B, S] int64, from 0 in every sequence
    sequence_ids  [B, S] int64, which of the N sequences a position belongs to; IGNORED_SEQUENCE on padding
    response_lengths [N] int64, true entries of loss_mask per sequence
    origins       the examples' origins, one per example
    cu_seqlens    [N + 1 or N + 2] int32 for a packed row (B = 1; the last piece may be padding), None where each row
                  is one sequence
    max_seqlen    longest piece of a packed row, 0 otherwise
    values        name → the examples' ``values`` [T], in the order of the response tokens
    desirable     [N] bool, the labels of unpaired examples; None where examples have none
    constants     name → a number of the whole step, the same in every micro-batch of it on every rank
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    sequence_ids: Tensor
    response_lengths: Tensor
    origins: tuple[str, ...]
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    values: Mapping[str, Tensor] = field(default_factory=dict)
    desirable: Tensor | None = None
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def n_sequences(self) -> int:
        return int(self.response_lengths.numel())

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch with every tensor on ``device``."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        values = {name: value.to(device) for name, value in self.values.items()}
        return replace(self, **moved, values=values)

    @property
    def last_token_mask(self) -> Tensor:
        """Where a sequence ends, [B, S] bool: N true entries, in the order of the sequences."""
        following = torch.nn.functional.pad(self.sequence_ids[:, 1:], (0, 1), value=IGNORED_SEQUENCE)
        return (self.sequence_ids != IGNORED_SEQUENCE) & (self.sequence_ids != following)

    @property
    def response_labels(self) -> Tensor:
        """The response tokens [T], row by row."""
        return self.labels[self.loss_mask]

    @property
    def response_sequence_ids(self) -> Tensor:
        """Which of the N sequences each response token belongs to [T]."""
        return self.sequence_ids[self.loss_mask]

    def sum_by_sequence(self, values_T: Tensor) -> Tensor:
        """Sum of per-token values [T] over each sequence: [N], differentiable."""
        return values_T.new_zeros(self.n_sequences).index_add(0, self.response_sequence_ids, values_T)


@dataclass(frozen=True)
class VocabHead:
    """A language-model head as one tensor-parallel rank holds it.

    ``weight`` [V_padded / TP, H]; row i is vocabulary entry ``first_column + i``; entries from ``vocab_size`` on are
    padding and take no part in any statistic. ``group`` is None where the vocabulary isn't sharded. Logits are W h over
    ``temperature``.
    """

    weight: Tensor
    vocab_size: int
    first_column: int = 0
    group: ProcessGroup | None = None
    temperature: float = 1.0

    @property
    def valid_columns(self) -> int:
        """Rows of ``weight`` that are true vocabulary entries (0 where the shard is all padding)."""
        return max(0, min(self.weight.shape[0], self.vocab_size - self.first_column))


@dataclass
class LossOutput:
    """A micro-batch's contribution: the step divides the sums by the globally reduced ``count`` once.

    total    scalar, differentiable: sum over the units that the loss averages
    count    units summed (tokens, sequences or pairs)
    sums     name → (numerator sum, denominator sum), 0-d, detached; the reported metric is their ratio after a SUM
             reduction over micro-batches and data-parallel ranks
    maxima   name → 0-d, detached; reduced with MAX
    """

    total: Tensor
    count: int
    sums: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)
