"""Two answers to the same prompt before a judge, in both orders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.evaluation.answers import Verdicts, mean_of_orders
from megatron_aligndistil.evaluation.benchmark_rows import filled
from megatron_aligndistil.evaluation.judge import ChatReply, ChatRequest, Judge

_ENDING = (
    "End with one line: [[A]] if answer A is better, [[B]] if answer B is better, or [[C]] if they are equally good."
)
_ANSWERS = "[Answer A]\n{answer_a}\n\n[Answer B]\n{answer_b}"
PROMPT = f"""You compare two answers to the same question. Judge how helpful, correct and fitting each is; neither \
their order nor their length counts.

[Question]
{{question}}

{_ANSWERS}

{_ENDING}"""
SUMMARY_PROMPT = f"""You compare two summaries of the same post. A good summary is short, true to the post, and tells \
what matters most to its reader; the order in which the two are shown does not count.

[Post]
{{question}}

{_ANSWERS.replace("Answer", "Summary")}

{_ENDING.replace("answer", "summary")}"""
FIELDS = ("{question}", "{answer_a}", "{answer_b}")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Pair:
    """A prompt's text and two answers to it."""

    prompt: str
    answer: str
    baseline: str


@dataclass(frozen=True)
class Judged:
    """Verdicts on pairs, the answer shown first and second, and what the judge said; None where it said nothing."""

    verdicts: Verdicts
    texts: Sequence[tuple[str | None, str | None]]
    first: Sequence[float | None]
    second: Sequence[float | None]


def check_prompt(key: str, prompt: str) -> None:
    """Raise ConfigError where a judge's prompt lacks a field."""
    missing = [name for name in FIELDS if name not in prompt]
    if missing:
        raise ConfigError(f"{key}: lacks {' and '.join(missing)}; write all of {', '.join(FIELDS)} into it")


def judge_pairs(judge: Judge, prompt: str, pairs: Sequence[Pair], max_tokens: int) -> Judged:
    """Who wins each pair. ``prompt`` has the fields {question}, {answer_a} and {answer_b}.

    Raises:
        DataError: as ``Judge.ask``.
    """
    orders = [(own.prompt, *both) for own in pairs for both in ((own.answer, own.baseline), (own.baseline, own.answer))]
    replies = judge.ask([_request(prompt, *shown, max_tokens) for shown in orders])
    texts = list(zip(*(iter(None if reply is None else reply.text for reply in replies),) * 2, strict=True))
    verdicts = [_verdict(reply) for reply in replies]
    first, second = verdicts[0::2], [None if seen is None else 1.0 - seen for seen in verdicts[1::2]]
    return Judged(mean_of_orders(first, second), texts, first, second)


def verdict_of(text: str) -> float | None:
    """1 for answer A, 0 for B, ½ for neither; None where ``text`` doesn't name exactly one verdict."""
    named = set(_VERDICT.findall(text))
    return {"A": 1.0, "B": 0.0, "C": 0.5}[named.pop()] if len(named) == 1 else None


def _verdict(reply: ChatReply | None) -> float | None:
    return None if reply is None else verdict_of(reply.text)


def _request(prompt: str, question: str, answer_a: str, answer_b: str, max_tokens: int) -> ChatRequest:
    values = {"question": question, "answer_a": answer_a, "answer_b": answer_b}
    return ChatRequest(({"role": "user", "content": filled(prompt, values)},), max_tokens)
