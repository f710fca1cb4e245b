"""Strategies that spoil what is sound: bytes, JSON values and texts."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

# What parsers trip over: control characters, half surrogates, separators, escapes, interpolations, long runs.
AWKWARD_TEXTS = (
    "",
    " ",
    "\x00",
    "\n",
    "\r\n",
    "\u2028",
    "\ufeff",
    "\ud800",
    "\udfff\ud800",
    "é́",
    "𝔘🦜",
    "\x1b[31m",
    "../../etc/passwd",
    "/",
    "~",
    "${oc.env:HOME}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${model.seed}",
    "${",
    "$",
    "{{ 7*7 }}",
    "{% for",
    "%s%n",
    "null",
    "nan",
    "1e999",
    "-0",
    "0x10",
    "'",
    '"',
    "\\",
    "a" * 5000,
    "[" * 500,
)
AWKWARD_NUMBERS = (0, 1, -1, 2**31, -(2**31) - 1, 2**63, 2**64, 10**40, 1e308, float("inf"), float("nan"), 0.5, -0.0)
# Placeholders, and the JSON that stands for them in the end: what Python's json module itself gives up on.
LONG = {
    **{f"@list of depth {depth}@": "[" * depth + "]" * depth for depth in (50, *range(700, 1000, 20), 20000)},
    "@deep object@": '{"a":' * 20000,
    "@many digits@": "9" * 5000,
}
WORDS = (0, 1, 7, 8, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def junk_scalars() -> SearchStrategy[Any]:
    """A JSON scalar of any type."""
    texts = st.sampled_from(AWKWARD_TEXTS) | st.text(st.characters(exclude_categories=()), max_size=12)
    return st.none() | st.booleans() | st.sampled_from(AWKWARD_NUMBERS) | st.integers() | st.floats() | texts


def junk() -> SearchStrategy[Any]:
    """Any JSON value."""
    keys = st.sampled_from(AWKWARD_TEXTS) | st.text(max_size=5)
    below = st.recursive(
        junk_scalars(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=5,
    )
    return below | st.sampled_from(list(LONG))


@st.composite
def spoiled_json(draw: DrawFn, samples: Sequence[Any]) -> str:
    """The text of a sample with one to three of its values replaced, removed, doubled or renamed; sometimes cut."""
    value = copy.deepcopy(draw(st.sampled_from(list(samples))))
    for _ in range(draw(st.integers(1, 3))):
        value = draw(_spoiled_value(value))
    text = json.dumps(value)
    for placeholder, long in LONG.items():
        text = text.replace(f'"{placeholder}"', long)
    if draw(st.integers(0, 9)) == 0:
        text = text[: draw(st.integers(0, len(text)))]
    return text


@st.composite
def _spoiled_value(draw: DrawFn, value: Any) -> Any:
    places = list(_places(value))
    if not places or draw(st.integers(0, 19)) == 0:
        return draw(junk())
    holder, key = draw(st.sampled_from(places))
    how = draw(st.sampled_from(("replace", "replace", "replace", "type", "remove", "double", "rename")))
    if how == "remove":
        del holder[key]
    elif how == "double" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif how == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(AWKWARD_TEXTS))] = holder.pop(key)
    elif how == "type":
        holder[key] = draw(st.sampled_from([str(holder[key]), [holder[key]], {"x": holder[key]}, None]))
    else:
        holder[key] = draw(junk())
    return value


def _places(value: Any, depth: int = 6) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:40]:
        yield value, key
        if depth:
            yield from _places(inner, depth - 1)


@st.composite
def spoiled_bytes(draw: DrawFn, samples: Sequence[bytes], head: int = 0) -> bytes:
    """A sample with one to four edits: flipped bits, other bytes, cuts, splices, runs of zeros, odd lengths.

    head  where it is given, half of the edits are within so many first bytes, where formats keep their lengths
    """
    data = bytearray(draw(st.sampled_from(list(samples))))
    for _ in range(draw(st.integers(1, 4))):
        size = len(data)
        last = min(head, size) if head and draw(st.booleans()) else size
        at = draw(st.integers(0, max(0, last - 1)))
        how = draw(st.sampled_from(("flip", "byte", "word", "cut", "drop", "insert", "splice", "zeros", "text")))
        run = draw(st.integers(1, 64))
        if how == "flip" and size:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and size:
            data[at] = draw(st.integers(0, 255))
        elif how == "word":
            data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(WORDS)))
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + run]
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif how == "splice" and size:
            other = draw(st.integers(0, size - 1))
            data[at : at + run] = data[other : other + run]
        elif how == "zeros":
            data[at : at + run] = bytes(run)
        elif how == "text":
            data[at:at] = draw(st.sampled_from(AWKWARD_TEXTS)).encode("utf-8", "surrogatepass")
    return bytes(data)


def spoiled_text_file(samples: Sequence[Any]) -> SearchStrategy[bytes]:
    """The bytes of a JSON file, spoiled as a value or as bytes."""
    values = spoiled_json(samples).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return values | spoiled_bytes([json.dumps(sample).encode() for sample in samples]) | st.binary(max_size=40)
