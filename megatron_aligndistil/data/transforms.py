"""Which responses of a row are used, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.types import Example, Record

PICKED: dict[str, tuple[int, ...]] = {"chosen": (0,), "rejected": (1,), "both": (0, 1)}


def swap_pair(example: Example) -> Example:
    """The pair with chosen and rejected exchanged: reverse DPO is DPO on swapped pairs (paper, Eq. 12)."""
    chosen, rejected = example.sequences
    return replace(example, sequences=(rejected, chosen))


def unpair(which: str) -> Callable[[Record], tuple[Record, ...]]:
    """A transform from a record to records of one response; a record that has one only is taken as it is."""
    if which not in PICKED:
        raise ConfigError(f"model.data.responses={which!r} is unknown; use one of {', '.join(PICKED)}")

    def transform(record: Record) -> tuple[Record, ...]:
        if len(record.responses) == 1:
            return (record,)
        return tuple(replace(record, responses=(record.responses[i],)) for i in PICKED[which])

    return transform
