"""Which data sets there are, how many rows were published of them, and where the rows of a split lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from megatron_aligndistil.data.records import Kind
from megatron_aligndistil.data.sources import LOCAL_SUFFIXES, Source, open_rows, resolve
from megatron_aligndistil.errors import DataError


@dataclass(frozen=True)
class Split:
    """A published split: its name on the hub, what local files of it may be called besides, and its rows."""

    name: str
    rows: int
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A data set of the hub. ``config`` is a subset that has to be named there, read from the hub's Parquet copy."""

    hub: str
    kind: Kind
    train: Split
    held_out: Split
    config: str | None = None


DATASETS: Mapping[str, Published] = {
    "ultrafeedback": Published(
        "HuggingFaceH4/ultrafeedback_binarized",
        "preference",
        Split("train_prefs", 61_135, ("train",)),
        Split("test_prefs", 2_000, ("test", "validation")),
    ),
    "ultrachat": Published(
        "HuggingFaceH4/ultrachat_200k",
        "demonstration",
        Split("train_sft", 207_865, ("train",)),
        Split("test_sft", 23_110, ("test", "validation")),
    ),
    "tldr": Published("trl-lib/tldr", "demonstration", Split("train", 116_722), Split("validation", 6_447)),
    "tldr-preference": Published(
        "trl-lib/tldr-preference", "preference", Split("train", 92_858), Split("validation", 86_086)
    ),
    "summarize-from-feedback": Published(
        "openai/summarize_from_feedback",
        "preference",
        Split("train", 92_858),
        Split("validation", 86_086),
        config="comparisons",
    ),
}


@dataclass(frozen=True)
class Rows:
    """Opened rows of one file or hub split, with the source that says how to read one."""

    source: Source
    rows: Dataset


def open_split(published: Published, split: Split, place: str | None, scratch: Path) -> list[Rows] | None:
    """The rows of ``split`` of a local folder, a local file (which is all training data) or the hub data set ``place``.

    Without a ``place`` it is the published hub data set. None where a local place has no such split.
    """
    if place is not None and Path(place).expanduser().exists():
        files = _local(Path(place).expanduser(), split, split == published.train)
        return [Rows(file, open_rows(file, str(scratch / str(at)))) for at, file in enumerate(files)] or None
    hub = place or published.hub
    if hub == published.hub and published.config is not None:
        return [_parquet_copy(hub, published.config, split.name)]
    [source] = resolve(f"{hub}:{split.name}")
    return [Rows(source, open_rows(source, str(scratch)))]


def _local(place: Path, split: Split, is_train: bool) -> list[Source]:
    """Files called after the split (``train_prefs.jsonl``, ``data/train_prefs-00000-of-00001.parquet``) or in a folder
    that is (``comparisons/train/0000.parquet``)."""
    if place.is_file():
        return resolve(str(place)) if is_train else []
    files = sorted(path for path in place.rglob("*") if path.suffix in LOCAL_SUFFIXES)
    for name in (split.name, *split.also):
        found = [path for path in files if path.stem == name or path.stem.startswith(f"{name}-")]
        found = found or [path for path in files if path.parent.name == name]
        if found:
            return [Source(str(path), path) for path in found]
    if is_train:
        names = " or ".join(f"{name}.jsonl" for name in (split.name, *split.also))
        raise DataError(f"{place}: no training split in it; give a folder with {names}, or such Parquet files")
    return []


def _parquet_copy(hub: str, config: str, split: str) -> Rows:
    """A split of a data set that has a loading script, which ``datasets`` no longer runs."""
    files = f"hf://datasets/{hub}@refs%2Fconvert%2Fparquet/{config}/{split}/*.parquet"
    try:
        rows: Any = load_dataset("parquet", data_files=files, split="train")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{hub}: the hub's Parquet copy cannot be loaded ({reason}); download it and give its folder by --source"
        ) from error
    return Rows(Source(f"{hub}:{split}", None, hub, split), rows)
