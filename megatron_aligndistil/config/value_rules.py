"""Single keys of commands that have many sections: the values that each may have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_aligndistil.config.rules import DATA_FILE_SUFFIXES
from megatron_aligndistil.errors import ConfigError

Choices = Mapping[str, tuple[str | None, ...]]


@dataclass(frozen=True)
class Bound:
    """What numbers of ``keys`` must hold, in words."""

    keys: tuple[str, ...]
    holds: Callable[[Any], bool]
    words: str


def at_least_one(*keys: str) -> Bound:
    """Numbers from 1."""
    return Bound(keys, lambda number: number >= 1, "at least 1")


def not_negative(*keys: str) -> Bound:
    """Numbers from 0."""
    return Bound(keys, lambda number: number >= 0, "0 or more")


def positive(*keys: str) -> Bound:
    """Numbers above 0."""
    return Bound(keys, lambda number: number > 0, "greater than 0")


def at_most(most: int, *keys: str) -> Bound:
    """Whole numbers from 1 that a machine can count to."""
    return Bound(keys, lambda number: 1 <= number <= most, f"at least 1 and at most {most}")


def limit(*keys: str) -> Bound:
    """How many rows."""
    return Bound(keys, lambda number: number == -1 or number >= 1, "-1 (all) or at least 1")


def share(*keys: str) -> Bound:
    """Such as top_p."""
    return Bound(keys, lambda number: 0 < number <= 1, "in (0, 1]")


def given(config: object, key: str) -> list[Any]:
    """The value of the dotted ``key``, where ``config`` has such a key."""
    try:
        return [attrgetter(key)(config)]
    except AttributeError:
        return []


def unusable_values(config: object, choices: Choices, bounds: Iterable[Bound]) -> Iterator[str]:
    """Complaints about values that aren't among the choices, or out of bounds; null is left to the choices."""
    for key, allowed in choices.items():
        for value in given(config, key):
            if value not in allowed:
                shown = ", ".join("null" if choice is None else choice for choice in allowed)
                yield f"{key}={value}: not a value of this key; choose one of {shown}"
    for bound in bounds:
        for key in bound.keys:
            for value in given(config, key):
                if value is not None and (not bound.holds(value) or value == float("inf")):
                    yield f"{key}={value}: out of range; must be {bound.words}"


def missing_paths(paths: Mapping[str, str | None]) -> Iterator[str]:
    """Complaints about files and folders that aren't there; by key."""
    for key, path in paths.items():
        if path is not None and not (path and Path(path).expanduser().exists()):
            yield f"{key}={path}: no such file or folder; correct the path"


def missing_data(key: str, names: Iterable[str]) -> Iterator[str]:
    """Complaints about data sets that look like local files and aren't there."""
    for name in names:
        looks_local = name.endswith(DATA_FILE_SUFFIXES) or name.startswith(("/", "./", "../", "~"))
        if looks_local and not Path(name).expanduser().exists():
            yield f"{key}: {name}: no such file or folder; correct the path"


def check_output(text: str) -> None:
    """Raise ConfigError where no folder can be made at ``output``."""
    output = Path(text).expanduser()
    existing = next(path for path in (output, *output.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output={text}: no folder can be made there; name another")
