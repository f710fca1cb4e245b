"""What benchmarks ask of models, and what models answer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_aligndistil.types import Message


@dataclass(frozen=True)
class Question:
    """A conversation to go on with.

    origin         file:row, for messages
    prompt         the messages before the first answer
    further_turns  what the user says after each answer but the last
    temperature    the benchmark's; sampling.temperature overrides it
    """

    origin: str
    prompt: tuple[Message, ...]
    further_turns: tuple[str, ...] = ()
    temperature: float = 0.0


@dataclass(frozen=True)
class Answer:
    """A model's answers to a question's turns; what isn't known of ready ones is None.

    tokens   of all turns, end tokens included
    ended    whether every turn came to its end token
    cut      turns whose prompt had to lose its beginning to leave room for an answer
    cramped  turns with less room than the benchmark gives an answer
    """

    turns: tuple[str, ...]
    tokens: int | None = None
    ended: bool | None = None
    cut: int = 0
    cramped: int = 0
