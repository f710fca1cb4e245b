"""Building tokenized data on disk: parse, tokenize and count in worker processes, publish the folder in one rename."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, load_from_disk

from megatron_aligndistil.config.json_text import read_json
from megatron_aligndistil.data.chat import ChatFormat
from megatron_aligndistil.data.records import Kind, records_of
from megatron_aligndistil.data.sources import Source, open_rows, read_row
from megatron_aligndistil.data.summary import Summary
from megatron_aligndistil.data.tokenize import TOKENIZED, LengthPolicy, tokenize
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.types import Record

ROWS_A_BATCH = 256
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Recipe:
    """What tokenized data is made of."""

    sources: list[Source]
    kind: Kind
    responses: str
    chat: ChatFormat
    policy: LengthPolicy


def read(folder: Path, verify: bool = True) -> tuple[Dataset, Summary] | None:
    """The data of a built folder, memory-mapped; None where there is none or it is damaged.

    ``verify`` reads its files through; the summary is always compared with its own hash.
    """
    try:
        content = read_json(folder / SUMMARY_FILE)
        if content["sha256"] != _digest(content):
            return None
        if verify and content["files"] != _file_hashes(folder):
            return None
        return load_from_disk(str(folder)), Summary(**content["summary"])
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None


def build(recipe: Recipe, folder: Path, workers: int) -> None:
    """Tokenize the recipe's sources into ``folder``; it appears whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix="building-") as scratch:
            parts, rows = [], 0
            for i, source in enumerate(recipe.sources):
                raw = open_rows(source, f"{scratch}/{i}")
                rows += len(raw)
                parts.append(_tokenized(raw, source, recipe, workers, f"{scratch}/tokenized-{i}.arrow"))
            tokenized = concatenate_datasets(parts)
            name = ", ".join(source.name for source in recipe.sources)
            kept, summary = _kept(tokenized, name, rows)
            if not summary.kept:
                raise DataError(
                    f"{name}: no example is left of {rows:,} rows, {summary.dropped_text}; "
                    "raise model.data.max_prompt_length and model.encoder_seq_length, or give other data"
                )
            target = Path(scratch) / "result"
            kept.save_to_disk(str(target))
            content = {"summary": asdict(summary), "files": _file_hashes(target)}
            (target / SUMMARY_FILE).write_text(json.dumps({**content, "sha256": _digest(content)}))
            _publish(target, folder)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: tokenized data cannot be written ({error.strerror or error}); "
            "free space there or set model.data.cache_dir"
        ) from error


def _tokenized(raw: Dataset, source: Source, recipe: Recipe, workers: int, file: str) -> Dataset:
    """The tokenized rows of one source, dropped ones included, in the Arrow file ``file``."""

    def work(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        records: list[Record] = []
        for at, index in enumerate(indices):
            origin, row = read_row(source, {name: column[at] for name, column in batch.items()}, index)
            records += records_of(row, origin, recipe.kind, recipe.responses)
        rows = tokenize(records, recipe.chat, recipe.policy)
        return {name: [getattr(row, name) for row in rows] for name in TOKENIZED}

    return raw.map(
        work,
        batched=True,
        with_indices=True,
        batch_size=ROWS_A_BATCH,
        remove_columns=raw.column_names,
        features=TOKENIZED,
        num_proc=min(workers, len(raw)) if workers > 1 and len(raw) > ROWS_A_BATCH else None,
        cache_file_name=file,
        load_from_cache_file=False,
        new_fingerprint=Path(file).stem,  # the folder's name is the fingerprint; hashing the tokenizer here is waste
        desc=f"tokenize {source.name}",
    )


def _kept(tokenized: Dataset, name: str, rows: int) -> tuple[Dataset, Summary]:
    """The examples that aren't dropped, and the counts of all."""
    table = tokenized.data
    dropped = Counter(table.column("dropped").to_pylist())
    keep = np.flatnonzero(pc.equal(table.column("dropped"), "").to_numpy())
    prompts = pc.list_value_length(table.column("prompt")).to_numpy()[keep].astype(np.int64)
    counts = pc.list_value_length(table.column("responses")).to_numpy()[keep]
    response_tokens = _tokens_of(table.column("responses"))[keep]
    lengths = prompts * np.maximum(counts, 1) + response_tokens
    counted = ["truncated", "dropped"]
    unlabelled = table.column("desirable").null_count == len(table)
    kept = tokenized.select(keep).remove_columns([*counted, "desirable"] if unlabelled else counted)
    summary = Summary(
        name=name,
        rows=rows,
        kept=len(keep),
        truncated=pc.sum(table.column("truncated")).as_py() or 0,
        tokens=int(lengths.sum()),
        response_tokens=int(response_tokens.sum()),
        max_length=int(lengths.max(initial=0)),
        fingerprint=_fingerprint(kept),
        dropped={reason: count for reason, count in dropped.items() if reason},
    )
    return kept, summary


def _tokens_of(responses: pa.ChunkedArray) -> np.ndarray:
    """Tokens of all responses of each row, [rows] int64."""
    out = [np.zeros(0, np.int64)]
    for chunk in responses.chunks:
        lengths = pc.list_value_length(chunk.flatten()).to_numpy()
        out.append(np.bincount(pc.list_parent_indices(chunk).to_numpy(), lengths, len(chunk)).astype(np.int64))
    return np.concatenate(out)


def _fingerprint(dataset: Dataset) -> str:
    """A hash of the token ids of all prompts and responses, in order, and of their labels where they have some."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(ROWS_A_BATCH):
        for name in ("prompt", "responses"):
            column = table.column(name).combine_chunks()
            while pa.types.is_list(column.type):
                digest.update(pc.list_value_length(column).to_numpy().tobytes())
                column = column.flatten()
            digest.update(column.to_numpy().tobytes())
        if "desirable" in dataset.column_names:
            digest.update(table.column("desirable").to_numpy().tobytes())
    return digest.hexdigest()


def _file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file but the summary, by name."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name != SUMMARY_FILE:
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of what the summary file holds beside it."""
    parts = {name: content[name] for name in ("summary", "files")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _publish(built: Path, folder: Path) -> None:
    """Rename into place; a damaged folder of that name gives way, one that another run has just built stays."""
    if read(folder) is not None:
        return
    if folder.exists():
        folder.rename(built.with_name("damaged"))
    try:
        built.rename(folder)
    except OSError:
        if read(folder) is None:
            raise
