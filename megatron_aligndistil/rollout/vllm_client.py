"""HTTP to a vLLM server: its failures are told apart into a lost engine and a request that it can't serve."""

from __future__ import annotations

import http.client
import json
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.rollout.engine import EngineLost

LONGEST_QUOTE = 300


class Refused(RolloutError):
    """The server is well and says no: a status from 400 to 499, ``status``."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """One server. Every request has a connection of its own, so any number of threads may ask at once."""

    def __init__(self, url: str, timeout: float) -> None:
        """``url`` as http(s)://host:port, with or without /v1; ``timeout`` in seconds, of any wait for an answer."""
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RolloutError(f"model.rollout.vllm.base_url={url}: not of the form http://host:port")
        self._secure, self._host, self._port, self._path = (
            parts.scheme == "https",
            parts.hostname,
            parts.port,
            parts.path,
        )

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The answer to GET, from JSON; None where it is empty.

        Raises:
            EngineLost: no connection, no answer in time, or a status from 500.
            Refused: a status from 400.
        """
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to POST of ``body`` as JSON; otherwise as ``get``."""
        return self._ask("POST", path, json.dumps(body or {}), None)

    def call(self, method: str, **arguments: str) -> list[dict[str, Any]]:
        """What ``method`` of the workers' extension answers, one dict a worker.

        Raises:
            EngineLost, Refused: as ``get``.
            RolloutError: a worker answers with an error.
        """
        answer = self.post("/collective_rpc", {"method": method, "kwargs": arguments})
        results: list[dict[str, Any]] = answer["results"]
        for result in results:
            if "error" in result:
                raise RolloutError(f"vLLM at {self.url}: {method} failed: {one_line(result['error'])}")
        return results

    def _ask(self, verb: str, path: str, body: str | None, timeout: float | None) -> Any:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout if timeout is None else timeout)
        try:
            connection.request(verb, self._path + path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            status, text = response.status, response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise EngineLost(f"vLLM at {self.url}{path}: {_cause(error)}") from None
        finally:
            connection.close()
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise EngineLost(f"vLLM at {self.url}{path}: status {status}: {_message(text)}")
        if status >= HTTPStatus.BAD_REQUEST:
            raise Refused(f"vLLM at {self.url}{path}: status {status}: {_message(text)}", status)
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise EngineLost(f"vLLM at {self.url}{path}: not JSON: {one_line(text)}") from None


def one_line(text: str) -> str:
    """``text`` without line breaks, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_QUOTE else line[:LONGEST_QUOTE] + "…"


def _cause(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"


def _message(text: str) -> str:
    """vLLM's own words in an error's JSON, else the text."""
    try:
        answer = json.loads(text)
        return one_line(str(answer["error"]["message"] if "error" in answer else answer["detail"]))
    except (ValueError, KeyError, TypeError):
        return one_line(text)
