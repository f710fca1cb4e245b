"""The judge against a small HTTP server that answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.evaluation import judge as judging
from megatron_aligndistil.evaluation.judge import Judge, Question, verdict_of

Answer = Callable[[dict[str, Any], dict[str, str]], tuple[int, str]]


def completion(text: str) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = answer(body, dict(self.headers))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/v1"
    finally:
        running.shutdown()
        running.server_close()


PROMPT = "{question}|{answer_a}|{answer_b}"
QUESTIONS = [Question(f"question {i}", answer, "base") for i, answer in enumerate(("good", "bad", "same", "strange"))]


def longer_is_better(body: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
    _, first, second = body["messages"][0]["content"].split("|")
    value = {"good": 2, "base": 1, "same": 1, "bad": 0, "strange": 1}
    if "strange" in (first, second):
        return completion("I can't say. Maybe [[A]] or [[B]].")
    order = value[first] - value[second]
    return completion(f"So: [[{'A' if order > 0 else 'B' if order < 0 else 'C'}]]")


def test_both_orders_are_asked_and_their_mean_taken() -> None:
    asked = []

    def answer(body: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
        asked.append(body["messages"][0]["content"])
        assert (body["model"], body["temperature"], headers["Authorization"]) == ("j", 0, "Bearer secret")
        return longer_is_better(body, headers)

    with server(answer) as url:
        verdicts, texts = Judge(url, "j", PROMPT, api_key="secret").verdicts(QUESTIONS)
    assert verdicts.won_P[:3].tolist() == [1.0, 0.0, 0.5]
    assert verdicts.unreadable == 2
    assert texts[0] == ("So: [[A]]", "So: [[B]]")
    assert {"question 0|good|base", "question 0|base|good"} <= set(asked) and len(set(asked)) == 8


def test_a_judge_that_prefers_the_first_answer_prefers_nobody() -> None:
    with server(lambda body, headers: completion("[[A]]")) as url:
        verdicts, _ = Judge(url, "j", PROMPT).verdicts(QUESTIONS)
    assert verdicts.won_P.tolist() == [0.5] * 4 and verdicts.unreadable == 0


def test_an_answer_that_names_a_field_or_a_verdict_is_text() -> None:
    """Fields inside answers aren't filled in, and braces of other kinds stay."""
    seen = []

    def answer(body: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
        seen.append(body["messages"][0]["content"])
        return completion("[[C]]")

    with server(answer) as url:
        Judge(url, "j", PROMPT).verdicts([Question("{x}", "{answer_b} [[A]]", "two")])
    assert sorted(seen) == ["{x}|two|{answer_b} [[A]]", "{x}|{answer_b} [[A]]|two"]


def test_what_passes_is_tried_again_and_what_does_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "PAUSE_SECONDS", 0.0)
    calls: list[int] = []

    def busy_twice(body: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
        calls.append(1)
        return (503 if len(calls) == 1 else 429, "busy") if len(calls) < 3 else completion("[[A]]")

    with server(busy_twice) as url:
        verdicts, _ = Judge(url, "j", PROMPT, concurrency=1).verdicts(QUESTIONS[:1])
        assert verdicts.unreadable == 0 and len(calls) == 4
    with server(lambda body, headers: (401, "no key")) as url, pytest.raises(DataError, match="status 401: no key"):
        Judge(url, "j", PROMPT).verdicts(QUESTIONS)
    with server(lambda body, headers: (500, "broken")) as url, pytest.raises(DataError, match="status 500: broken"):
        Judge(url, "j", PROMPT, attempts=2).verdicts(QUESTIONS[:1])
    with server(lambda body, headers: (200, "<html>")) as url, pytest.raises(DataError, match="not a chat completion"):
        Judge(url, "j", PROMPT).verdicts(QUESTIONS[:1])
    with pytest.raises(DataError, match="no answer"):
        Judge("http://127.0.0.1:9/v1", "j", PROMPT, attempts=1).verdicts(QUESTIONS[:1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[A]]", 1.0),
        ("x [[B]]\n", 0.0),
        ("[[C]]", 0.5),
        ("[[A]] … [[A]]", 1.0),
        ("A", None),
        ("[[A]] [[B]]", None),
        ("", None),
    ],
)
def test_verdicts_are_read_and_never_guessed(text: str, expected: float | None) -> None:
    assert verdict_of(text) == expected


def test_a_prompt_without_a_field_and_a_wrong_address_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"analysis\.judge\.prompt: lacks \{answer_b\}"):
        Judge("http://host/v1", "j", "{question} {answer_a}")
    with pytest.raises(ConfigError, match=r"analysis\.judge\.base_url=host:8000"):
        Judge("host:8000", "j")
