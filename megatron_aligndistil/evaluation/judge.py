"""A judge: a language model behind an OpenAI-compatible endpoint that says which of two answers is better."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.evaluation.answers import Verdicts, mean_of_orders

KEY = "analysis.judge"
PROMPT = """You compare two answers to the same question. Judge how helpful, correct and fitting each is; neither \
their order nor their length counts.

[Question]
{question}

[Answer A]
{answer_a}

[Answer B]
{answer_b}

End with one line: [[A]] if answer A is better, [[B]] if answer B is better, or [[C]] if they are equally good."""
FIELDS = ("{question}", "{answer_a}", "{answer_b}")
VERDICT = re.compile(r"\[\[([ABC])\]\]")
QUOTED = 200
PAUSE_SECONDS = 1.0  # before the second attempt; doubled with each


@dataclass(frozen=True)
class Question:
    """A prompt's text, the model's answer and the baseline's."""

    prompt: str
    answer: str
    baseline: str


@dataclass(frozen=True)
class Judge:
    """Where it is, and what it is asked. ``prompt`` has the fields {question}, {answer_a} and {answer_b}."""

    base_url: str
    model: str
    prompt: str = PROMPT
    api_key: str | None = None
    max_tokens: int = 512
    timeout_seconds: float = 120.0
    attempts: int = 3
    concurrency: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{KEY}.base_url={self.base_url}: not of the form http://host:port/v1")
        missing = [name for name in FIELDS if name not in self.prompt]
        if missing:
            raise ConfigError(f"{KEY}.prompt: lacks {' and '.join(missing)}; write all of {', '.join(FIELDS)} into it")

    def verdicts(self, questions: Sequence[Question]) -> tuple[Verdicts, list[tuple[str, str]]]:
        """Who wins each question, asked in both orders; and what the judge wrote, the model's answer first then second.

        Raises:
            DataError: the endpoint refuses a request, or fails as often as it is asked.
        """
        pool = ThreadPoolExecutor(min(self.concurrency, max(1, 2 * len(questions))), thread_name_prefix="judge")
        try:
            first = pool.map(lambda q: self._ask(q.prompt, q.answer, q.baseline), questions)
            second = pool.map(lambda q: self._ask(q.prompt, q.baseline, q.answer), questions)
            texts = list(zip(first, second, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
        own_first = [verdict_of(text) for text, _ in texts]
        own_second = [None if (seen := verdict_of(text)) is None else 1.0 - seen for _, text in texts]
        return mean_of_orders(own_first, own_second), texts

    def _ask(self, question: str, answer_a: str, answer_b: str) -> str:
        """The judge's text."""
        filled = {"question": question, "answer_a": answer_a, "answer_b": answer_b}
        # One pass, so that a field's name inside an answer stays as it is.
        content = re.sub(r"\{(question|answer_a|answer_b)\}", lambda found: filled[found[1]], self.prompt)
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        attempt = 1
        while True:
            status, text = self._post(body)
            if status == HTTPStatus.OK:
                return _content(text, self.base_url)
            busy = status == HTTPStatus.TOO_MANY_REQUESTS or (status or 0) >= HTTPStatus.INTERNAL_SERVER_ERROR
            if not (busy or status is None) or attempt == self.attempts:
                shown, said = " ".join(text.split())[:QUOTED], "no answer" if status is None else f"status {status}"
                raise DataError(f"{KEY}.base_url={self.base_url}: {said}: {shown}; check the endpoint, model and key")
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            attempt += 1

    def _post(self, body: Mapping[str, Any]) -> tuple[int | None, str]:
        """The status, None where there is no answer, and the text."""
        parts = urlsplit(self.base_url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout_seconds)
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.request("POST", f"{parts.path.rstrip('/')}/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return None, f"{type(error).__name__}: {error}"
        finally:
            connection.close()


def verdict_of(text: str) -> float | None:
    """1 for answer A, 0 for B, ½ for neither; None where ``text`` doesn't name exactly one verdict."""
    named = set(VERDICT.findall(text))
    return {"A": 1.0, "B": 0.0, "C": 0.5}[named.pop()] if len(named) == 1 else None


def _content(text: str, url: str) -> str:
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        shown = " ".join(text.split())[:QUOTED]
        raise DataError(f"{KEY}.base_url={url}: not a chat completion: {shown!r}; check the address") from None
    return content if isinstance(content, str) else ""
