"""A judge: a language model behind an OpenAI-compatible endpoint, asked through OpenAI's own client."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from megatron_aligndistil.config.json_text import parse_json
from megatron_aligndistil.errors import ConfigError, DataError, reason
from megatron_aligndistil.evaluation.content_cache import ContentCache, key_of
from megatron_aligndistil.evaluation.request_threads import in_threads
from megatron_aligndistil.types import Message

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

# Of one request alone, such as a prompt longer than the judge's context: the others are still worth asking.
_REFUSES_REQUEST = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
_HOPELESS = 5  # requests skipped before any was answered, beside those that are under way


@dataclass(frozen=True)
class ChatRequest:
    """What a judge is asked. ``top_logprobs``: how many likely tokens it tells at each place; None for none."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int | None = None


@dataclass(frozen=True)
class ChatReply:
    """What a judge said. ``choice`` is the reply's ``choices[0]``; tokens are 0 where the endpoint doesn't tell."""

    choice: Mapping[str, Any]
    prompt_tokens: int
    completion_tokens: int

    @property
    def text(self) -> str:
        """Its words; empty where it said none."""
        content = self.choice["message"]["content"]
        return content if isinstance(content, str) else ""


@dataclass
class Usage:
    """Requests by what became of them, and tokens of those answered now."""

    answered: int = 0
    cached: int = 0
    skipped: int = 0  # refused by themselves, or answered by something that isn't a chat completion
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is, and how it is asked; messages name its keys under ``key``."""

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 120.0
    attempts: int = 6
    concurrency: int = 8
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    key: str = "judge"

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.key}.base_url={self.base_url!r}: not of the form http://host:port/v1")
        if self.api_key is not None and not self.api_key.isascii():
            raise ConfigError(f"{self.key}.api_key_variable: its key has other characters than ASCII; correct it")


class Judge:
    """Asks an endpoint; replies are kept by content in ``cache``. ``usage`` counts since it was made.

    Where ``stop`` is set nothing more is asked, and ``ask`` raises ``Stopped`` within seconds.
    """

    def __init__(self, endpoint: Endpoint, cache: ContentCache) -> None:
        self.endpoint, self.usage, self.stop = endpoint, Usage(), threading.Event()
        self.cache, self._lock = cache, threading.Lock()
        self._failure = ""

    def check(self) -> None:
        """Raise DataError where nobody answers at the address, before anything is made for it."""
        import openai

        client = self._client()
        try:
            listed = [model.id for model in client.models.list()]
        except openai.APIConnectionError as error:
            raise self._error(_cause(error)) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._error(reason(error)) from error
        except Exception as error:  # an endpoint need not serve its list of models, nor one that can be read
            logger.info("the judge's list of models cannot be read: %s", reason(error))
            self._check_by_asking(client)
            return
        if listed and self.endpoint.model not in listed:
            shown = ", ".join(listed[:5])
            raise DataError(
                f"{self.endpoint.key}.model={self.endpoint.model}: {self.endpoint.base_url} serves {shown}; name one"
            )

    def _check_by_asking(self, client: openai.OpenAI) -> None:
        import openai

        try:
            client.chat.completions.create(
                model=self.endpoint.model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1
            )
        except openai.NotFoundError as error:
            raise self._error(f"no chat completions there, or not of this model ({reason(error)})") from error
        except Exception as error:  # whatever is wrong with this one need not be with those that matter
            logger.info("the judge refuses a first word: %s", reason(error))

    def ask(self, requests: Sequence[ChatRequest], what: str = "judgments") -> list[ChatReply | None]:
        """The replies in order; None for a request that alone is refused, or that gets no chat completion.

        What was answered before is not asked again, nor is a request that is there twice. Busy or failing endpoints
        are asked again with growing pauses.

        Raises:
            DataError: the endpoint cannot be reached, refuses the key, fails as often as it is asked, or has refused
                the first requests one and all.
        """
        made_of = [self._made_of(request) for request in requests]
        keys = [key_of(own) for own in made_of]
        replies: dict[str, ChatReply | None] = {}
        for key, own in zip(keys, made_of, strict=True):
            if key not in replies and (value := self.cache.get(own)) is not None:
                replies[key] = ChatReply(**value)
        self.usage.cached += len(replies)
        missing = {
            key: (own, request) for key, own, request in zip(keys, made_of, requests, strict=True) if key not in replies
        }
        if missing:
            replies |= self._ask_all(missing, what)
        return [replies[key] for key in keys]

    def _ask_all(
        self, missing: Mapping[str, tuple[Mapping[str, Any], ChatRequest]], what: str
    ) -> dict[str, ChatReply | None]:
        client, replies = self._client(), {}
        asked = in_threads(
            lambda key: self._ask(client, *missing[key]), list(missing), self.endpoint.concurrency, self.stop
        )
        # Those under way are finished, and kept: what an endpoint has been asked it is paid for.
        with tqdm(total=len(missing), desc=what, unit="request", dynamic_ncols=True) as bar, closing(asked):
            for key, reply in asked:
                replies[key] = reply
                bar.update()
                usage = self.usage
                tokens = f"tokens {usage.prompt_tokens:,} in, {usage.completion_tokens:,} out"
                bar.set_postfix_str(tokens, refresh=False)
        if self.usage.skipped and self._nothing_heard:
            raise self._error(self._failure)
        return replies

    def _ask(self, client: openai.OpenAI, made_of: Mapping[str, Any], request: ChatRequest) -> ChatReply | None:
        import openai

        body: dict[str, Any] = {"messages": list(request.messages), "max_tokens": request.max_tokens}
        if request.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        try:
            raw = client.chat.completions.with_raw_response.create(
                model=self.endpoint.model,
                temperature=request.temperature,
                extra_body=dict(self.endpoint.extra_body) or None,
                **body,
            )
        except openai.APIStatusError as error:
            if error.status_code in _REFUSES_REQUEST:
                self._skip(reason(error))
                return None
            raise self._error(f"status {error.status_code}: {reason(error)}") from error
        except openai.APIConnectionError as error:
            raise self._error(_cause(error)) from error
        reply = _reply(raw.text)
        if reply is None:
            self._skip(f"not a chat completion: {reason(ValueError(raw.text))!r}")
            return None
        self.cache.put(made_of, asdict(reply))
        with self._lock:
            self.usage.answered += 1
            self.usage.retries += raw.retries_taken
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
        return reply

    def _skip(self, why: str) -> None:
        with self._lock:
            self.usage.skipped += 1
            self._failure = why
            hopeless = self._nothing_heard and self.usage.skipped >= _HOPELESS + self.endpoint.concurrency - 1
        if hopeless:
            raise self._error(why)
        logger.warning("a request to the judge is skipped and counted: %s", why)

    @property
    def _nothing_heard(self) -> bool:
        return self.usage.answered + self.usage.cached == 0

    def _made_of(self, request: ChatRequest) -> dict[str, Any]:
        # The address isn't part of it: the same model may be served elsewhere tomorrow.
        return {"judge": self.endpoint.model, "extra_body": dict(self.endpoint.extra_body), **asdict(request)}

    def _client(self) -> openai.OpenAI:
        import openai

        try:
            return openai.OpenAI(
                base_url=self.endpoint.base_url,
                api_key=self.endpoint.api_key or "none",
                timeout=self.endpoint.timeout_seconds,
                max_retries=self.endpoint.attempts - 1,
            )
        except Exception as error:  # of whatever the client finds wrong with an address
            url = f"{self.endpoint.key}.base_url={self.endpoint.base_url!r}"
            raise ConfigError(f"{url}: {reason(error)}; correct it") from error

    def _error(self, said: str) -> DataError:
        key, url = self.endpoint.key, self.endpoint.base_url
        return DataError(
            f"{key}.base_url={url}: {said}; check the endpoint, {key}.model={self.endpoint.model} and the key. What "
            "was answered is kept: the same command goes on from there"
        )


def _cause(error: BaseException) -> str:
    """The library's "Connection error." says less than what caused it."""
    return f"no answer ({reason(error.__cause__ or error)})"


def _reply(text: str) -> ChatReply | None:
    """The reply of a response's body; None where it is no chat completion."""
    try:
        body = parse_json(text)
        choice, usage = body["choices"][0], body.get("usage") or {}
        # Half a surrogate pair, from a text that was cut, can be written nowhere.
        choice = parse_json(json.dumps(choice, ensure_ascii=False).encode(errors="replace").decode())
        choice["message"]["content"]
        return ChatReply(choice, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
