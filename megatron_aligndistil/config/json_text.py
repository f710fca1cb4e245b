"""JSON that others wrote: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it isn't JSON (JSONDecodeError says where), or nests deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def parse_text(text: str) -> Any:
    """As ``parse_json``, of a value that can be written in UTF-8 again.

    Raises:
        ValueError: it isn't JSON, or an escape in it is half a surrogate pair.
    """
    value = parse_json(text)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path) -> Any:
    """The value of a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: as ``parse_json``, or it isn't UTF-8.
        OSError: it cannot be read.
    """
    return parse_json(path.read_text(encoding="utf-8-sig"))
