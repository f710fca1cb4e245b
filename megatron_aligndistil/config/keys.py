"""Dotted keys as text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def key_of(override: str) -> str:
    """``a.b`` of ``+a.b=value``."""
    return override.partition("=")[0].lstrip("+~")


def bare(key: str) -> str:
    """``a.b[1]`` without the index."""
    return re.sub(r"\[\d+\]", "", key)


def closest(key: str, keys: Iterable[str]) -> str | None:
    """Of ``keys`` what someone who wrote ``key`` may have meant: the one above it, or one with a similar last name."""
    keys = list(keys)
    above = [known for known in keys if key.startswith(f"{known}.")]
    if above:
        return max(above, key=len)
    last = key.rpartition(".")[2]
    names = difflib.get_close_matches(last, {known.rpartition(".")[2] for known in keys}, n=3)
    names = [last] if last in names else names
    candidates = [known for known in keys if known.rpartition(".")[2] in names]
    return max(candidates, key=lambda known: difflib.SequenceMatcher(None, key, known).ratio(), default=None)
