"""Benchmarks' JSON lines whose rows have ids, and judges' prompts whose fields are filled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_aligndistil.config.json_text import parse_text
from megatron_aligndistil.errors import DataError, reason

Id = str | int


@dataclass(frozen=True)
class Row:
    """A line's object; ``origin`` is its file:row."""

    origin: str
    values: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Raise DataError where the field isn't a text."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise DataError(f"{self.origin}: no text '{name}'; add it to the row")
        return value

    def id(self, *names: str) -> Id:
        """The first of these fields that is there; raise DataError where none is, or it is neither text nor integer."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool):
                return value
        raise DataError(f"{self.origin}: no {' or '.join(names)}, a text or an integer; add it to the row")


def read_text(path: Path, what: str, remedy: str = "name another") -> str:
    """A file's text. ``what`` names it in messages.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{what}: no such file; {remedy}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{what}: not a text file in UTF-8 ({reason(error)}); {remedy}") from error


def read_rows(path: Path, what: str = "") -> list[Row]:
    """The objects of a file of JSON lines; blank lines are left out. ``what`` names the file in messages.

    Raises:
        DataError: it cannot be read, has no row, or a line is no JSON object.
    """
    # Not splitlines, which also ends a line at U+2028, a legal part of a JSON text.
    lines = read_text(path, what or str(path)).split("\n")
    rows = [Row(f"{path}:{row}", _object(f"{path}:{row}", line)) for row, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{what or path}: no rows; JSON objects, one a line, are wanted")
    return rows


def by_id(rows: Sequence[Row], *names: str) -> dict[Id, Row]:
    """Rows under their ids, in order.

    Raises:
        DataError: a row has no id, or one that was there before.
    """
    found: dict[Id, Row] = {}
    for row in rows:
        own = row.id(*names)
        if own in found:
            raise DataError(f"{row.origin}: {names[0]}={own} is that of {found[own].origin} too; remove one of them")
        found[own] = row
    return found


def in_order(path: Path, found: Mapping[Id, Row], wanted: Mapping[Id, str]) -> list[Row]:
    """The rows of all wanted ids (id → where it was asked for), in their order.

    Raises:
        DataError: one is missing, or a row is nobody's.
    """
    for own, row in found.items():
        if own not in wanted:
            asked = next(iter(wanted.values())).rpartition(":")[0]
            raise DataError(f"{row.origin}: question {own} is not one of {asked}; remove the row")
    for own, origin in wanted.items():
        if own not in found:
            raise DataError(f"{path}: no row with question {own}, which {origin} asks; add its answer")
    return [found[own] for own in wanted]


def fields(template: str) -> Iterator[str]:
    """Names in single braces."""
    return (found[1] for found in _FIELD.finditer(template))


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its fields' values, in one pass: a field's name inside a value stays as it is."""
    return _FIELD.sub(lambda found: values.get(found[1], found[0]), template)


_FIELD = re.compile(r"\{([a-z]\w*)\}")


def _object(origin: str, line: str) -> Mapping[str, Any]:
    try:
        value = parse_text(line)
    except ValueError as error:
        raise DataError(f"{origin}: not JSON ({reason(error)}); correct the row") from error
    if not isinstance(value, dict):
        raise DataError(f"{origin}: not a JSON object; correct the row")
    return value
