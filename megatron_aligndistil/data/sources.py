"""Where rows come from: hub data sets, JSONL and Parquet files, folders of them. All are Arrow-backed ``datasets``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from megatron_aligndistil.config.json_text import parse_json
from megatron_aligndistil.errors import DataError, reason

LOCAL_SUFFIXES = (".jsonl", ".parquet")
FILE_LIKE_SUFFIXES = (*LOCAL_SUFFIXES, ".json", ".csv", ".txt", ".gz", ".zst", ".arrow")
HUB_NAME = re.compile(r"^(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w.\[\]:%+-]+))?$")
LINES = Features({"line": Value("int64"), "text": Value("string")})
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Source:
    """One file (``path``) or one split of a hub data set. ``name`` is what error messages call it."""

    name: str
    path: Path | None = None
    hub_name: str = ""
    split: str | None = None


def resolve(source: str) -> list[Source]:
    """The files or the hub data set that an entry of ``model.data.data_prefix`` names."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in LOCAL_SUFFIXES)
        if not files:
            raise DataError(f"{source}: this folder holds no .jsonl or .parquet file; name one that does")
        return [Source(str(file), file) for file in files]
    if path.exists():
        if path.suffix not in LOCAL_SUFFIXES:
            raise DataError(f"{source}: cannot read {path.suffix or 'a file without suffix'}; give .jsonl or .parquet")
        return [Source(source, path)]
    hub = HUB_NAME.match(source)
    if hub is None or path.suffix in FILE_LIKE_SUFFIXES or source.startswith("."):
        raise DataError(f"{source}: no such file or folder, and not a hub name (name or name:split); correct the path")
    return [Source(source, None, hub["name"], hub["split"])]


def content_fingerprint(source: Source) -> str:
    """A hash that changes when the rows change: of a file's bytes, or the one ``datasets`` gives a hub revision."""
    if source.path is None:
        return str(_load_hub(source)._fingerprint)
    try:
        with source.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read ({error.strerror}); correct its permissions or path") from error


def open_rows(source: Source, scratch: str) -> Dataset:
    """The rows of one source, memory-mapped from ``scratch`` (a hub data set from the hub's own cache).

    A JSONL file's rows are its lines, {line, text}, blank ones left out: ``read_row`` parses them, since a parser of
    whole files neither says which line is broken nor keeps each row's own types.
    """
    if source.path is None:
        return _load_hub(source)
    try:
        if source.path.suffix == ".parquet":
            if not pq.read_metadata(source.path).num_rows:
                raise _empty(source)
            rows = Dataset.from_parquet(str(source.path), cache_dir=scratch)
            rows.data.validate(full=True)  # texts that aren't UTF-8, which would only fail when they are taken out
            return rows
        return Dataset.from_generator(_lines, features=LINES, cache_dir=scratch, gen_kwargs={"source": source})
    except DataError:
        raise
    except Exception as error:  # a damaged Parquet file shows as any of the errors of Arrow and datasets
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        # The system's errors, which have a number, are of the scratch folder: a full disk.
        if isinstance(cause, DataError) or (isinstance(cause, OSError) and cause.errno):
            raise cause from None
        raise DataError(f"{source.name}: cannot be read ({reason(cause)}); write the file again") from error


def read_row(source: Source, raw: Mapping[str, Any], index: int) -> tuple[str, Mapping[str, Any]]:
    """The origin ``file:row`` (1-based) and the fields of what ``open_rows`` gave at ``index`` (0-based)."""
    if source.path is None or source.path.suffix == ".parquet":
        return f"{source.name}:{index + 1}", raw
    origin, text = f"{source.name}:{raw['line']}", raw["text"]
    try:
        row = parse_json(text)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20]
        where = f"{error.msg} at column {error.pos + 1} near {near!r}"
        raise DataError(f"{origin}: not valid JSON, {where}; correct or remove the line") from None
    except ValueError as error:
        raise DataError(f"{origin}: {error}; correct or remove the line") from None
    if not isinstance(row, dict):
        raise DataError(f"{origin}: {text[:SHOWN_CHARACTERS]!r} isn't a JSON object; give one object a line")
    return origin, row


def _lines(source: Source) -> Iterator[dict[str, Any]]:
    assert source.path is not None
    empty = True
    with source.path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
            except UnicodeDecodeError as error:
                where = f"byte {error.start + 1} is {line[error.start : error.start + 1]!r}"
                raise DataError(f"{source.name}:{number}: not UTF-8, {where}; save the file as UTF-8") from None
            if text:  # a blank line is no row
                empty = False
                yield {"line": number, "text": text}
    if empty:
        raise _empty(source)


def _empty(source: Source) -> DataError:
    return DataError(f"{source.name}: holds no rows; give a file that does")


def _load_hub(source: Source) -> Dataset:
    try:
        data = load_dataset(source.hub_name, split=source.split)
    except (OSError, ValueError) as error:  # DatasetNotFoundError and the hub's connection errors are OSErrors
        raise DataError(
            f"{source.name}: no such file here, and not loaded from the hub ({reason(error)}); correct the name or path"
        ) from error
    if isinstance(data, DatasetDict):
        if len(data) > 1 and "train" not in data:
            raise DataError(f"{source.name}: has the splits {', '.join(data)}; name one, {source.hub_name}:<split>")
        data = data["train"] if "train" in data else next(iter(data.values()))
    return data
