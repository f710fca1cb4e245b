"""What passes, what fails, and what is printed."""

from __future__ import annotations

import json
import math

import pytest

from megatron_aligndistil.certificate.findings import (
    HEADER,
    NOT_FINITE,
    Bounds,
    Finding,
    Measurement,
    rows,
    summary,
    to_json,
    worst_over_ranks,
)

BOUNDS = Bounds(value_error=1e-5, gradient_error=1e-5, words=3)


def judged(value: float = 1e-6, gradient: float = 1e-5, words: float | None = 3.0, peak: int = 8) -> Finding:
    return Finding.judged("kernel", "tp2", Measurement(value, gradient, words, peak), BOUNDS)


@pytest.mark.parametrize(
    ("finding", "complaints"),
    [
        (judged(), []),
        (judged(words=None), []),  # a rank that holds no head
        (judged(value=1.1e-5), ["value error 1.10e-05, at most 1.00e-05"]),
        (judged(gradient=math.nan), ["gradient error nan, at most 1.00e-05"]),
        (judged(value=math.inf, words=4.0), ["value error inf, at most 1.00e-05", "4 words a token, not 3"]),
        (judged(words=0.0), ["0 words a token, not 3"]),
    ],
)
def test_judgement(finding: Finding, complaints: list[str]) -> None:
    assert list(finding.complaints) == complaints
    assert finding.passed == (not complaints)


def test_ranks_are_merged_to_their_worst() -> None:
    ranks = [
        [judged(value=1e-7, words=None, peak=5), judged()],
        [judged(value=1e-6, peak=9), judged(gradient=math.nan)],
    ]
    first, second = worst_over_ranks(ranks)
    assert (first.value_error, first.words_per_token, first.peak_bytes, first.passed) == (1e-6, 3.0, 9, True)
    assert not second.passed
    assert second.gradient_error == NOT_FINITE


def test_json_has_numbers_only_where_numbers_belong() -> None:
    findings = [judged(), judged(value=math.nan)]
    loaded = json.loads(to_json(findings), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert loaded[0] == {
        "name": "kernel",
        "layout": "tp2",
        "value_error": 1e-6,
        "gradient_error": 1e-5,
        "words_per_token": 3.0,
        "peak_bytes": 8,
        "passed": True,
    }
    assert loaded[1]["value_error"] == 1e300
    assert loaded[1]["passed"] is False


def test_table_and_summary() -> None:
    findings = [judged(peak=12345), judged(words=4.0)]
    assert all(len(row) == len(HEADER) for row in rows(findings))
    assert rows(findings)[0] == ("kernel", "tp2", "1.0e-06", "1.0e-05", "3", "12,345", "pass")
    assert rows(findings)[1][-1] == "FAIL"
    assert summary(findings[:1]) == "all 1 passed"
    assert summary(findings) == "FAIL kernel tp2: 4 words a token, not 3\n1 of 2 failed"
