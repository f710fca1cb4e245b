"""From a row of a data set to a ``Record``: which schema it has, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from megatron_aligndistil.data.sources import open_rows, read_row, resolve
from megatron_aligndistil.data.transforms import unpair
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.types import Message, Record

Kind = Literal["preference", "demonstration", "unpaired", "prompt"]
Prompt = tuple[Message, ...]

SHOWN_CHARACTERS = 60
SHOWN_FIELDS = 12
RESPONSE_FIELDS = ("completion", "response")
TURN = re.compile(r"\n\n(Human|Assistant):")
TURN_ROLES = {"Human": "user", "Assistant": "assistant"}
SCHEMAS = "chosen and rejected, messages, or prompt and completion"


def read_records(source: str, kind: Kind, responses: str = "chosen") -> Iterator[Record]:
    """The records of a data set in file order.

    ``source`` is a hub name (``name`` or ``name:split``), a .jsonl or .parquet file, or a folder of them. ``kind``
    "preference" gives (chosen, rejected) records, "demonstration" records of one response, "unpaired" the same with a
    label, "prompt" records of none; ``responses`` says which ones of a preference row a demonstration is. Raises
    ``DataError`` at the first row that can't be read.
    """
    for part in resolve(source):
        with TemporaryDirectory() as scratch:
            for index, raw in enumerate(open_rows(part, scratch)):
                origin, row = read_row(part, raw, index)
                yield from records_of(row, origin, kind, responses)


def records_of(row: Mapping[str, Any], origin: str, kind: Kind, responses: str = "chosen") -> tuple[Record, ...]:
    """The records that one row gives: one, or two where a pair gives both its responses."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}, not one of {get_args(Kind)}")
    if kind == "prompt":
        return (Record(origin, _prompt(row, origin), ()),)
    record = read_record(row, origin)
    if kind == "unpaired":
        return _labelled(record, row)
    if kind == "demonstration":
        return unpair(responses)(record)
    if len(record.responses) == 1:
        raise DataError(f"{origin}: not a preference, its fields are {_fields(row)}; give chosen and rejected")
    return (record,)


def read_record(row: Mapping[str, Any], origin: str) -> Record:
    """Recognise the schema of ``row``: preference, plain messages, or prompt and completion, in this order."""
    if _has(row, "chosen") or _has(row, "rejected"):
        prompt, *pair = _pair(row, origin)
        return Record(origin, prompt, tuple(pair))
    if _has(row, "messages"):
        prompt, response = _conversation(row, "messages", origin)
        return Record(origin, prompt, (response,))
    for field in RESPONSE_FIELDS:
        if _has(row, field):
            prompt, response = _conversation(row, field, origin)
            return Record(origin, prompt, (response,))
    raise DataError(f"{origin}: no response in its fields {_fields(row)}; give {SCHEMAS}")


def _labelled(record: Record, row: Mapping[str, Any]) -> tuple[Record, ...]:
    """A response with the row's label, or those of a pair: the chosen one desirable, the rejected one not."""
    if len(record.responses) == 2:
        return tuple(
            replace(record, responses=(response,), desirable=desirable)
            for response, desirable in zip(record.responses, (True, False), strict=True)
        )
    if not _has(row, "label"):
        raise DataError(
            f"{record.origin}: field label is missing, its fields are {_fields(row)}; add true (desirable) or "
            "false, or give chosen and rejected"
        )
    label = row["label"]
    if not isinstance(label, bool):
        raise DataError(f"{record.origin}: label is {_short(label)}; it must be true (desirable) or false")
    return (replace(record, desirable=label),)


def _prompt(row: Mapping[str, Any], origin: str) -> Prompt:
    """What a row of any schema asks: a prompt on its own, messages that end with the user's, or before the response."""
    if not any(_has(row, field) for field in ("chosen", "rejected", "messages", *RESPONSE_FIELDS)):
        if not _has(row, "prompt"):
            raise DataError(f"{origin}: no prompt in its fields {_fields(row)}; give prompt, or {SCHEMAS}")
        return _prompt_field(row, origin)
    if not _has(row, "chosen") and _has(row, "messages"):
        turns = _messages(row["messages"], origin, "messages")
        if turns and turns[-1]["role"] == "user":
            return turns
    return read_record(row, origin).prompt


def _pair(row: Mapping[str, Any], origin: str) -> tuple[Prompt, str, str]:
    for field in ("chosen", "rejected"):
        if not _has(row, field):
            raise DataError(f"{origin}: field {field} is missing, its fields are {_fields(row)}; a pair needs both")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and not _has(row, "prompt"):
        return _implicit_text_pair(chosen, rejected, origin)
    prompt, response = _conversation(row, "chosen", origin)
    other_prompt, other_response = _conversation(row, "rejected", origin)
    if prompt != other_prompt:
        ours, theirs = _first_difference(prompt, other_prompt)
        raise DataError(f"{origin}: chosen and rejected have different prompts, {ours} and {theirs}; correct the row")
    return prompt, response, other_response


def _implicit_text_pair(chosen: str, rejected: str, origin: str) -> tuple[Prompt, str, str]:
    """A pair of texts that begin with their prompt: a Human/Assistant transcript, or a shared beginning."""
    _text(chosen, origin, "chosen")
    _text(rejected, origin, "rejected")
    if TURN.match(chosen) and TURN.match(rejected):
        row = {"chosen": _transcript(chosen), "rejected": _transcript(rejected)}
        return _pair(row, origin)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and not chosen[shared - 1].isspace():  # never inside a word
        shared -= 1
    prompt = chosen[:shared].strip()
    if not prompt:
        raise DataError(f"{origin}: chosen {_short(chosen)} and rejected share no prompt; add a prompt field")
    responses = [
        _text(text[shared:].strip(), origin, f"the response of {field}")
        for field, text in (("chosen", chosen), ("rejected", rejected))
    ]
    return _user(prompt), responses[0], responses[1]


def _transcript(text: str) -> list[Message]:
    pieces = TURN.split(text)[1:]
    return [
        {"role": TURN_ROLES[role], "content": content.strip()}
        for role, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _conversation(row: Mapping[str, Any], field: str, origin: str) -> tuple[Prompt, str]:
    """The prompt's messages and the text of the last assistant turn of ``row[field]``, a text or a message list."""
    value = row[field]
    given = _prompt_field(row, origin) if field != "messages" else ()
    if not isinstance(value, list | tuple):
        response = _text(value, origin, field)
        if not given:
            raise DataError(f"{origin}: field prompt is missing, its fields are {_fields(row)}; add it")
        return given, response
    turns = _messages(value, origin, field)
    if not turns or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "nothing"
        raise DataError(f"{origin}: {field} ends with {last!r}; its last message must be the assistant's response")
    prompt = _joined(given, turns[:-1], origin, field)
    if not prompt:
        raise DataError(f"{origin}: {field} holds a response without a prompt; add a user message or a prompt field")
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{origin}: {field} has two assistant messages in a row; merge them or remove the row")
    return prompt, turns[-1]["content"]


def _joined(given: Prompt, head: Prompt, origin: str, field: str) -> Prompt:
    """The whole prompt, where the messages before the response may repeat the prompt field or continue it."""
    if not given or not head:
        return given or head
    asked = {turn["content"].strip() for turn in head if turn["role"] == "user"}
    if head[: len(given)] == given or (len(given) == 1 and given[0]["content"].strip() in asked):
        return head
    if head[0]["role"] in ("assistant", "tool"):
        return given + head
    shown = _short(given[-1]["content"])
    raise DataError(f"{origin}: prompt {shown} isn't the one that {field} begins with; correct or remove the field")


def _prompt_field(row: Mapping[str, Any], origin: str) -> Prompt:
    if not _has(row, "prompt"):
        return ()
    value = row["prompt"]
    if isinstance(value, list | tuple):
        turns = _messages(value, origin, "prompt")
        if not turns:
            raise DataError(f"{origin}: prompt is empty; give it a user message or remove the row")
        return turns
    return _user(_text(value, origin, "prompt"))


def _messages(value: Any, origin: str, field: str) -> Prompt:
    if not isinstance(value, list | tuple):
        raise DataError(f"{origin}: {field} is {_short(value)}; it must be a list of messages")
    turns: list[Message] = []
    for i, turn in enumerate(value):
        where = f"{field}[{i}]"
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise DataError(f'{origin}: {where} is {_short(turn)}; a message is {{"role": …, "content": …}}')
        if turn["role"] == "system" and turn.get("content") == "":
            turns.append({"role": "system", "content": ""})
        else:
            turns.append({"role": turn["role"], "content": _text(turn.get("content"), origin, f"{where}.content")})
    return tuple(turns)


def _text(value: Any, origin: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin}: {field} is {_short(value)}; it must be text")
    if not value.strip():
        raise DataError(f"{origin}: {field} is empty ({_short(value)}); give it text or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        shown = _short(value[max(0, error.start - 10) : error.end + 10])
        raise DataError(f"{origin}: {field} holds half a surrogate pair near {shown}; correct the text") from None
    return value


def _user(text: str) -> Prompt:
    return ({"role": "user", "content": text},)


def _has(row: Mapping[str, Any], field: str) -> bool:
    return row.get(field) is not None


def _fields(row: Mapping[str, Any]) -> str:
    names = [key if len(key) <= SHOWN_CHARACTERS else _short(key) for key in row if _has(row, key)]
    more = f" and {len(names) - SHOWN_FIELDS} more" if len(names) > SHOWN_FIELDS else ""
    return (", ".join(names[:SHOWN_FIELDS]) or "none") + more


def _first_difference(ours: Prompt, theirs: Prompt) -> tuple[str, str]:
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return _short(mine["content"]), _short(other["content"])
    return f"{len(ours)} messages", f"{len(theirs)}"


def _short(value: Any) -> str:
    shown = repr(value[: SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= SHOWN_CHARACTERS else shown[: SHOWN_CHARACTERS - 1] + "…"
