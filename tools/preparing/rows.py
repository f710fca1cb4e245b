"""One row of a published data set: what is wrong with it, and the line that training reads instead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_aligndistil.data.records import Kind, read_record
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.types import Record

RESPONSES = ("chosen", "rejected", "messages", "completion", "response")
EMPTY, TIED_SCORES, TIED_RESPONSES = "empty text", "tied scores", "equal responses"
REDDIT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"  # as trl-lib/tldr writes it
ARTICLE = "TITLE: {title}\n\n{article}\n\nTL;DR:"


@dataclass(frozen=True)
class Kept:
    """A row that is kept: its JSON, and digests (16 bytes) of its prompt and of prompt and responses."""

    line: str
    prompt: bytes
    whole: bytes


def read(row: Mapping[str, Any], origin: str, kind: Kind) -> Kept | str:
    """The row in our schema, or the reason for which it is left out.

    Raises DataError where the row has none of the known schemas.
    """
    if row.get("summaries") is not None:
        row = _of_comparison(row, origin)
    if _has_empty_text(row):
        return EMPTY
    record = read_record(row, origin)
    if kind == "preference":
        if len(record.responses) != 2:
            raise DataError(f"{origin}: one response, not a pair; give chosen and rejected, or another DATASET")
        scores = (row.get("score_chosen"), row.get("score_rejected"))
        if scores[0] is not None and scores[0] == scores[1]:
            return TIED_SCORES
        if record.responses[0].strip() == record.responses[1].strip():
            return TIED_RESPONSES
    elif len(record.responses) != 1:
        raise DataError(f"{origin}: a pair of responses, not one; give messages, or another DATASET")
    return _kept(record)


def _of_comparison(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A row of summarize_from_feedback's comparisons: two summaries of a post or an article, and which is better."""
    info, summaries, choice = row.get("info"), row["summaries"], row.get("choice")
    if not isinstance(info, Mapping) or len(summaries) != 2 or choice not in (0, 1):
        raise DataError(f"{origin}: summaries without info, or choice isn't 0 or 1; give rows of 'comparisons'")
    texts = [summary["text"] for summary in summaries]
    form = ARTICLE if info.get("article") is not None else REDDIT
    fields = {name: info.get(name) or "" for name in ("subreddit", "title", "post", "article")}
    asked = fields["article"] or fields["post"]
    return {"prompt": form.format(**fields) if asked else "", "chosen": texts[choice], "rejected": texts[1 - choice]}


def _has_empty_text(row: Mapping[str, Any]) -> bool:
    return any(isinstance(text, str) and not text.strip() for text in _texts(row))


def _texts(row: Mapping[str, Any]) -> Iterator[Any]:
    """Prompt and responses; not a system message, which may be empty."""
    for field in ("prompt", *RESPONSES):
        value = row.get(field)
        if isinstance(value, list | tuple):
            turns = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role") != "system"]
            yield from (turn.get("content") for turn in turns)
            if not value:
                yield ""
        elif field == "prompt" and any(isinstance(row.get(name), list | tuple) for name in RESPONSES):
            continue  # it repeats one of the messages
        elif value is not None:
            yield value


def _kept(record: Record) -> Kept:
    fields: dict[str, Any] = {"prompt": [dict(turn) for turn in record.prompt]}
    names = ("chosen", "rejected") if len(record.responses) == 2 else ("completion",)
    fields |= zip(names, record.responses, strict=True)
    # White space and the system message aside: what a held-out prompt must not have in common with training.
    asked = [" ".join(turn["content"].split()) for turn in record.prompt if turn["role"] != "system"]
    return Kept(json.dumps(fields, ensure_ascii=False), _digest(*asked), _digest(json.dumps(fields)))


def _digest(*texts: str) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()
