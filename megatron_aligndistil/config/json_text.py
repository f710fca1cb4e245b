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


def read_json(path: Path) -> Any:
    """The value of a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: as ``parse_json``, or it isn't UTF-8.
        OSError: it cannot be read.
    """
    return parse_json(path.read_text(encoding="utf-8-sig"))
