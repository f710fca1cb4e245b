"""Pairs before a judge in both orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.evaluation.content_cache import ContentCache
from megatron_aligndistil.evaluation.judge import Endpoint, Judge
from megatron_aligndistil.evaluation.pairwise import (
    FIELDS,
    PROMPT,
    SUMMARY_PROMPT,
    Pair,
    check_prompt,
    judge_pairs,
    verdict_of,
)
from tests.unit.evaluation.judge_server import Response, serving

TEMPLATE = "{question}|{answer_a}|{answer_b}"
PAIRS = [Pair(f"question {i}", answer, "base") for i, answer in enumerate(("good", "bad", "same", "strange", "gone"))]


def by_value(body: dict[str, Any]) -> Response | str:
    _, first, second = body["messages"][0]["content"].split("|")
    value = {"good": 2, "base": 1, "same": 1, "bad": 0}
    if "gone" in (first, second):
        return Response("{}", 400)
    if "strange" in (first, second):
        return "I can't say. Maybe [[A]] or [[B]]."
    order = value[first] - value[second]
    return f"So: [[{'A' if order > 0 else 'B' if order < 0 else 'C'}]]"


def test_both_orders_are_asked_and_their_mean_taken(tmp_path: Path) -> None:
    with serving(by_value) as server:
        judged = judge_pairs(Judge(Endpoint(server.url, "tiny"), ContentCache(tmp_path)), TEMPLATE, PAIRS, 16)
    assert judged.verdicts.won_P[:3].tolist() == [1.0, 0.0, 0.5]
    assert judged.verdicts.unreadable == 4
    assert judged.texts[0] == ("So: [[A]]", "So: [[B]]") and judged.texts[4] == (None, None)
    assert judged.first[:4] == [1.0, 0.0, 0.5, None] and judged.second[:4] == [1.0, 0.0, 0.5, None]
    assert {"question 0|good|base", "question 0|base|good"} <= set(server.prompts) and len(server.asked) == 10


def test_a_judge_that_prefers_the_first_answer_prefers_nobody(tmp_path: Path) -> None:
    with serving(lambda body: "[[A]]") as server:
        judged = judge_pairs(Judge(Endpoint(server.url, "tiny"), ContentCache(tmp_path)), TEMPLATE, PAIRS, 16)
    assert judged.verdicts.won_P.tolist() == [0.5] * 5 and judged.verdicts.unreadable == 0


def test_fields_inside_answers_stay_as_they_are(tmp_path: Path) -> None:
    with serving(lambda body: "[[C]]") as server:
        pair = Pair("{answer_b}", "{question} {x}", "{answer_a}")
        judge_pairs(Judge(Endpoint(server.url, "tiny"), ContentCache(tmp_path)), TEMPLATE, [pair], 16)
    assert set(server.prompts) == {"{answer_b}|{question} {x}|{answer_a}", "{answer_b}|{answer_a}|{question} {x}"}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("[[A]]", 1.0), ("[[B]] [[B]]", 0.0), ("[[C]]", 0.5), ("[[A]][[B]]", None), ("A", None), ("", None)],
)
def test_verdicts_are_read_and_never_guessed(text: str, verdict: float | None) -> None:
    assert verdict_of(text) == verdict


def test_a_prompt_that_lacks_a_field() -> None:
    for prompt in (PROMPT, SUMMARY_PROMPT):
        check_prompt("k", prompt)
        assert all(prompt.count(field) == 1 for field in FIELDS)
    with pytest.raises(ConfigError, match=r"^benchmark.judge_prompt: lacks \{answer_b\}"):
        check_prompt("benchmark.judge_prompt", "{question} {answer_a}")
