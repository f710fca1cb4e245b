"""MT-Bench's single-answer grading: which prompt of the user's file asks for a rating, and what was said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_aligndistil.evaluation.benchmark_rows import Id, filled
from megatron_aligndistil.evaluation.bradley_terry import ratio
from megatron_aligndistil.evaluation.intervals import Estimate
from megatron_aligndistil.evaluation.judge import ChatRequest, Judge
from megatron_aligndistil.types import Message

TURNS = 2
MAX_TOKENS = 2048  # of a judgment
WITH_REFERENCE = ("math", "reasoning", "coding")
TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
OTHER_TEMPERATURE = 0.7  # of categories that the benchmark doesn't have
LOWEST, HIGHEST = 1.0, 10.0
# By whether there is a reference, and the turn.
PROMPTS = {
    (False, 0): "single-v1",
    (True, 0): "single-math-v1",
    (False, 1): "single-v1-multi-turn",
    (True, 1): "single-math-v1-multi-turn",
}

_NUMBER = r"\d+\.?\d*"
_RATINGS = (re.compile(rf"\[\[({_NUMBER})\]\]"), re.compile(rf"\[({_NUMBER})\]"))


@dataclass(frozen=True)
class JudgePrompt:
    """A row of the user's file of prompts."""

    name: str
    system: str
    template: str


@dataclass(frozen=True)
class TwoTurns:
    """A question; ``reference``: answers to both turns where its category is judged by them."""

    id: Id
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None


@dataclass(frozen=True)
class Grade:
    """What the judge made of a turn; ``said`` is None where it was skipped, ``rating`` where there is none."""

    prompt: str
    said: str | None
    rating: float | None


@dataclass(frozen=True)
class Scores:
    """Mean ratings; missing ones are in no mean. ``missing`` has them by turn, ``skipped`` those without a reply."""

    turns: tuple[Estimate, Estimate]
    average: Estimate
    categories: Mapping[str, tuple[Estimate, Estimate, Estimate]]  # first turn, second, both
    missing: tuple[int, int]
    skipped: int


def needed_fields(has_reference: bool, turn: int) -> tuple[str, ...]:
    """What a prompt must ask about."""
    if turn == 0:
        return ("question", "answer", *(("ref_answer_1",) if has_reference else ()))
    fields = ("question_1", "answer_1", "question_2", "answer_2")
    return (*fields, *(("ref_answer_1", "ref_answer_2") if has_reference else ()))


def rating_of(text: str) -> float | None:
    """The first ``[[x]]``, else the first ``[x]``; None where there is none, or it isn't from 1 to 10."""
    for pattern in _RATINGS:
        found = pattern.search(text)
        if found is not None:
            rating = float(found[1])
            return rating if LOWEST <= rating <= HIGHEST else None
    return None


def grade(
    judge: Judge,
    prompts: Mapping[str, JudgePrompt],
    questions: Sequence[TwoTurns],
    answers: Sequence[tuple[str, str]],
    max_tokens: int,
) -> list[tuple[Grade, Grade]]:
    """Ratings of both turns of every answer.

    Raises:
        DataError: as ``Judge.ask``.
    """
    asked = [
        (prompts[PROMPTS[question.reference is not None, turn]], _values(question, answer, turn))
        for question, answer in zip(questions, answers, strict=True)
        for turn in range(TURNS)
    ]
    replies = judge.ask([ChatRequest(_messages(prompt, values), max_tokens) for prompt, values in asked])
    grades = [
        Grade(prompt.name, None, None) if reply is None else Grade(prompt.name, reply.text, rating_of(reply.text))
        for (prompt, _), reply in zip(asked, replies, strict=True)
    ]
    return list(zip(grades[0::2], grades[1::2], strict=True))


def scores(questions: Sequence[TwoTurns], grades: Sequence[tuple[Grade, Grade]], samples: int, seed: int) -> Scores:
    """Means over questions, whose both ratings are resampled together; the average is over all ratings."""
    ratings = np.array([[np.nan if own.rating is None else own.rating for own in both] for both in grades])
    of = np.array([question.category for question in questions])
    categories = {name: _means(ratings[of == name], samples, seed) for name in dict.fromkeys(of.tolist())}
    first, second, average = _means(ratings, samples, seed)
    missing = np.isnan(ratings).sum(axis=0)
    skipped = sum(own.said is None for both in grades for own in both)
    return Scores((first, second), average, categories, (int(missing[0]), int(missing[1])), skipped)


def _means(ratings_N2: np.ndarray, samples: int, seed: int) -> tuple[Estimate, Estimate, Estimate]:
    there, known = ~np.isnan(ratings_N2), np.nan_to_num(ratings_N2)
    first, second = (ratio(known[:, turn], there[:, turn], samples, seed) for turn in range(TURNS))
    return first, second, ratio(known.sum(axis=1), there.sum(axis=1), samples, seed)


def _values(question: TwoTurns, answer: tuple[str, str], turn: int) -> dict[str, str]:
    values = {f"ref_answer_{place}": text for place, text in enumerate(question.reference or (), 1)}
    if turn == 0:
        return values | {"question": question.turns[0], "answer": answer[0]}
    for place in range(TURNS):
        values |= {f"question_{place + 1}": question.turns[place], f"answer_{place + 1}": answer[place]}
    return values


def _messages(prompt: JudgePrompt, values: Mapping[str, str]) -> tuple[Message, ...]:
    user: Message = {"role": "user", "content": filled(prompt.template, values)}
    return ({"role": "system", "content": prompt.system}, user) if prompt.system else (user,)
