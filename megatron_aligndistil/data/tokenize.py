"""Records to token ids: rendering, the split into prompt and response, and the limits on length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from datasets import Features, List, Value

from megatron_aligndistil.config.base_schema import DataConfig
from megatron_aligndistil.data.chat import REMEDY, ChatFormat
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.types import Record

TOKENIZATION_VERSION = 1  # raise it with every change that alters token ids: tokenized data on disk is then rebuilt

TOKENIZED = Features(
    {
        "origin": Value("string"),
        "prompt": List(Value("int32")),
        "responses": List(List(Value("int32"))),
        "desirable": Value("bool"),  # null where responses have no labels
        "truncated": Value("bool"),
        "dropped": Value("string"),  # the reason; "" where the example is kept
    }
)


@dataclass(frozen=True)
class LengthPolicy:
    """Limits in tokens, and what happens beyond them. A pair is cut or dropped as a whole."""

    max_prompt_length: int
    encoder_seq_length: int
    long_prompt: str
    long_response: str

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("long_prompt", self.long_prompt, ("drop", "truncate_left")),
            ("long_response", self.long_response, ("truncate_right", "drop")),
        ):
            if value not in allowed:
                raise ConfigError(f"model.data.{key}={value!r} is unknown; use {' or '.join(allowed)}")
        if self.max_prompt_length < 1:
            raise ConfigError(f"model.data.max_prompt_length={self.max_prompt_length} must be at least 1")
        if self.encoder_seq_length < 2:  # a prompt token and a response token
            raise ConfigError(f"model.encoder_seq_length={self.encoder_seq_length} must be at least 2")

    @classmethod
    def from_config(cls, data: DataConfig, encoder_seq_length: int) -> LengthPolicy:
        return cls(data.max_prompt_length, encoder_seq_length, data.long_prompt, data.long_response)

    @property
    def prompt_limit(self) -> int:
        """Longest prompt: the configured one, and at least one response token must fit behind it."""
        return min(self.max_prompt_length, self.encoder_seq_length - 1)


@dataclass(frozen=True)
class Tokenized:
    """A tokenized record: the prompt and one or two responses, or why it is dropped."""

    origin: str
    prompt: list[int]
    responses: list[list[int]]
    desirable: bool | None = None
    truncated: bool = False
    dropped: str = ""


def tokenize(records: list[Record], chat: ChatFormat, policy: LengthPolicy) -> list[Tokenized]:
    """Tokenize a batch of records and apply the limits, in order."""
    prompt_texts: list[str] = []
    texts: list[str] = []
    for record in records:
        try:
            prompt_text, conversations = chat.texts(record.prompt, record.responses)
        except DataError as error:
            raise DataError(f"{record.origin}: {error}") from None
        prompt_texts.append(prompt_text)
        texts += conversations
    prompts = chat.token_ids(prompt_texts)
    whole = iter(zip(texts, chat.token_ids(texts), strict=True))
    out = []
    for record, prompt, prompt_text in zip(records, prompts, prompt_texts, strict=True):
        try:
            responses = [_response(chat, prompt, len(prompt_text), whole) for _ in record.responses]
        except DataError as error:
            raise DataError(f"{record.origin}: {error}") from None
        out.append(limit(Tokenized(record.origin, prompt, responses, record.desirable), policy))
    return out


def _response(
    chat: ChatFormat, prompt: list[int], prompt_characters: int, whole: Iterator[tuple[str, list[int]]]
) -> list[int]:
    """Ids of the response, its end token included and whatever the template writes after that left out.

    The prompt's ids are those that generation continues, so where a merge crosses the border the response is tokenized
    on its own.
    """
    text, ids = next(whole)
    splits = ids[: len(prompt)] == prompt
    response = ids[len(prompt) :] if splits else chat.token_ids([text[prompt_characters:]])[0]
    end, written = chat.end
    if not written:
        return [*response, end]
    if end not in response:
        raise DataError(f"the chat template doesn't end every response with its end token, {end}; {REMEDY}")
    return response[: len(response) - response[::-1].index(end)]


def limit(row: Tokenized, policy: LengthPolicy) -> Tokenized:
    """Apply the policy to one record. A response that is cut loses its end token: nothing is taught to stop there."""
    prompt, longest = row.prompt, policy.prompt_limit
    if len(prompt) > longest:
        if policy.long_prompt == "drop":
            return _dropped(row, f"prompt over {longest} tokens")
        prompt = prompt[-longest:]
    room = policy.encoder_seq_length - len(prompt)
    too_long = any(len(response) > room for response in row.responses)
    if too_long and policy.long_response == "drop":
        return _dropped(row, f"prompt and response over {policy.encoder_seq_length} tokens")
    responses = [response[:room] for response in row.responses]
    truncated = too_long or len(row.prompt) > longest
    return replace(row, prompt=prompt, responses=responses, truncated=truncated)


def _dropped(row: Tokenized, reason: str) -> Tokenized:
    return replace(row, prompt=[], responses=[], dropped=reason)
