"""Arena-Hard v0.1: two games a question against a baseline, five verdicts, and the style of answers."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_aligndistil.errors import reason
from megatron_aligndistil.evaluation.benchmark_rows import filled
from megatron_aligndistil.evaluation.judge import ChatReply, ChatRequest, Judge
from megatron_aligndistil.types import Message

logger = logging.getLogger(__name__)

MAX_TOKENS = 4096  # of a judgment
GAMES = 2  # in the first the baseline is A, in the second B
FIELDS = ("question_1", "answer_1", "answer_2")
FEATURES = ("length", "headers", "lists", "bold")
TOKENS, CHARACTERS = "cl100k_base tokens", "characters"  # what length is in
TOKEN_FILES = "TIKTOKEN_CACHE_DIR"

SYSTEM = """You judge two assistants' answers, A and B, to the same request of a user. Which of them stands first \
means nothing, and neither does its length.

First work out for yourself what a good answer to the request is. Then hold both answers against it: what is wrong or \
missing, what is beside the point, what is longer than it need be. An answer that asks back where the request is \
ambiguous is better than one that guesses. Originality counts where the request calls for it.

Explain your judgment, and end with one line that holds exactly one of these labels:
[[A>>B]] if A is much better
[[A>B]] if A is somewhat better
[[A=B]] if they are about as good
[[B>A]] if B is somewhat better
[[B>>A]] if B is much better"""
TEMPLATE = """Request of the user:
{question_1}

=== Answer of assistant A ===
{answer_1}
=== End of A's answer ===

=== Answer of assistant B ===
{answer_2}
=== End of B's answer ==="""
AGAIN = "Go on with your judgment, and end it with one of the five labels as your verdict."

_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")
# Points of answer A, and whether the win is a strong one.
_VERDICTS = {"A>>B": (1.0, True), "A>B": (1.0, False), "A=B": (0.5, False), "B>A": (0.0, False), "B>>A": (0.0, True)}
_CODE = re.compile("```([^`]*)```")
_MARKS = (
    (re.compile(r"^#{1,6}\s", re.MULTILINE),),
    (re.compile(r"^\s*\d+\.\s", re.MULTILINE), re.compile(r"^\s*[-*+]\s", re.MULTILINE)),
    (re.compile(r"\*\*[^*\n]+\*\*"), re.compile(r"__[^_\n]+__")),
)


@dataclass(frozen=True)
class ArenaPrompt:
    """A judge's prompt; ``templates`` are messages of the user, with the fields of ``FIELDS``."""

    system: str = SYSTEM
    templates: tuple[str, ...] = (TEMPLATE,)


@dataclass(frozen=True)
class Match:
    """A question's text, the baseline's answer and a model's."""

    question: str
    baseline: str
    answer: str


@dataclass(frozen=True)
class Game:
    """What the judge said, both times where it was asked twice; None where it was skipped.

    ``label`` is None where it named none of the five, or several.
    """

    said: str | None
    label: str | None
    asked_again: bool


@dataclass(frozen=True)
class Length:
    """What the length of answers is in, and a count of it."""

    unit: str
    of: Callable[[str], int]


def play(judge: Judge, prompt: ArenaPrompt, matches: Sequence[Match], max_tokens: int) -> list[tuple[Game, Game]]:
    """Both games of every match. Where the judge names no label at all it is asked once more, as upstream does.

    Raises:
        DataError: as ``Judge.ask``.
    """
    sides = [side for own in matches for side in ((own, own.baseline, own.answer), (own, own.answer, own.baseline))]
    asked = [_messages(prompt, own.question, first, second) for own, first, second in sides]
    replies = judge.ask([ChatRequest(messages, max_tokens) for messages in asked])
    unsaid = [i for i, reply in enumerate(replies) if reply is not None and not _labels(reply.text)]
    further = judge.ask([ChatRequest(_again(asked[i], replies[i]), max_tokens) for i in unsaid]) if unsaid else []
    seconds = dict(zip(unsaid, further, strict=True))
    games = [_game(reply, i in seconds, seconds.get(i)) for i, reply in enumerate(replies)]
    return list(zip(games[0::GAMES], games[1::GAMES], strict=True))


def label_of(text: str) -> str | None:
    """The verdict, where exactly one of the five is named."""
    labels = _labels(text)
    label = labels.pop() if len(labels) == 1 else None
    return label if label in _VERDICTS else None


def points(games: tuple[Game, Game], strong_weight: int) -> tuple[float, float]:
    """The model's points in a match, and the weight of its readable games: upstream's battles, counted."""
    won, weight = 0.0, 0.0
    for place, game in enumerate(games):
        if game.label is not None:
            share, strong = _VERDICTS[game.label]
            battles = strong_weight if strong else 1
            won += battles * (share if place == 1 else 1.0 - share)
            weight += battles
    return won, weight


def length_counter() -> Length:
    """Upstream's tokens where tiktoken is set up to find them, without a network if they are there; else characters."""
    if os.environ.get(TOKEN_FILES):
        try:
            import tiktoken

            encoding = tiktoken.get_encoding("cl100k_base")
        except Exception as error:  # of whatever its download raises
            logger.warning("%s: no cl100k_base (%s); lengths are in characters", TOKEN_FILES, reason(error))
        else:
            return Length(TOKENS, lambda text: len(encoding.encode(text, disallowed_special=())))
    return Length(CHARACTERS, len)


def style_of(text: str, length: Length) -> np.ndarray:
    """An answer's length, and its headers, list items and bold spans outside code blocks, as upstream counts them."""
    plain = text
    for block in _CODE.findall(text):
        plain = plain.replace(block, "")
    return np.array(
        [length.of(text), *(sum(len(mark.findall(plain)) for mark in marks) for marks in _MARKS)], np.float64
    )


def style_difference(answer: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Each feature's difference over its sum, to which upstream adds one."""
    return (answer - baseline) / (answer + baseline + 1.0)


def _labels(text: str) -> set[str]:
    return set(_LABEL.findall(text))


def _game(reply: ChatReply | None, asked_again: bool, second: ChatReply | None) -> Game:
    if reply is None:
        return Game(None, None, False)
    said = reply.text if second is None else f"{reply.text}\n{second.text}"
    return Game(said, label_of(said), asked_again)


def _messages(prompt: ArenaPrompt, question: str, first: str, second: str) -> tuple[Message, ...]:
    values = dict(zip(FIELDS, (question, first, second), strict=True))
    users: list[Message] = [{"role": "user", "content": filled(template, values)} for template in prompt.templates]
    return ({"role": "system", "content": prompt.system}, *users)


def _again(messages: tuple[Message, ...], reply: ChatReply | None) -> tuple[Message, ...]:
    assert reply is not None
    return (*messages, {"role": "assistant", "content": reply.text}, {"role": "user", "content": AGAIN})
