"""Published data sets as the JSONL that training reads: python tools/prepare_data.py DATASET OUTPUT [--source FOLDER].

OUTPUT gets ``train.jsonl``, ``validation.jsonl``, which shares no prompt with it, and ``summary.json``. A row is
{prompt: messages, chosen, rejected} or {prompt: messages, completion}. The rows of the source are counted against the
published numbers; empty, tied, repeated and unreadable ones are left out and counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preparing.datasets import DATASETS, Published, Rows, Split, open_split
from preparing.rows import Kept, read
from tqdm import tqdm

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.data.records import Kind
from megatron_aligndistil.data.sources import read_row
from megatron_aligndistil.errors import DataError, UserError
from megatron_aligndistil.launch import failures
from megatron_aligndistil.launch.log import configure_logging

logger = logging.getLogger("megatron_aligndistil.prepare_data")

TRAIN, VALIDATION, SUMMARY = "train.jsonl", "validation.jsonl", "summary.json"
REPEATED, IN_TRAIN, UNREADABLE = "repeated row", "prompt of a training row", "unreadable row"
UNREADABLE_SHARE = 0.01  # beyond it the source has another schema
SHOWN = 3  # unreadable rows that the log names


@dataclass
class Part:
    """Rows that are kept, in a file, with the digest of each one's prompt; and what became of the others."""

    path: Path
    rows: int = 0
    prompts: list[bytes] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. Errors of the user's are raised."""
    options = _parser().parse_args(arguments)
    published = DATASETS[options.dataset]
    if options.held_out is not None and options.held_out < 1:
        raise DataError(f"--held-out {options.held_out}: at least 1 row is needed; give more")
    output: Path = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".preparing-") as scratch:
            parts = _parts(options, published, Path(scratch))
            summary = _summary(options, published, parts)
            (output / SUMMARY).unlink(missing_ok=True)  # it comes last, and so is of these files where it is
            for name, part in parts.items():
                os.replace(part.path, output / name)
            write_text(output / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{output}: cannot be written ({reason}); free space there or choose another") from error
    for name in parts:
        print(f"{output / name}: {_line(summary['files'][name])}")
    return 0


def _parts(options: argparse.Namespace, published: Published, scratch: Path) -> dict[str, Part]:
    """The two files in ``scratch``. Both splits are counted before either is read."""
    train = open_split(published, published.train, options.source, scratch / "train")
    held_out = open_split(published, published.held_out, options.source, scratch / "held_out")
    assert train is not None
    _check_count(options, published.train, train, options.expect, "--expect")
    if held_out is not None:
        _check_count(options, published.held_out, held_out, options.expect_held_out, "--expect-held-out")
    elif options.held_out is None:
        raise DataError(f"{options.source}: no held-out split in it; add --held-out N to take N rows of training's")

    kept = _read(train, published.kind, scratch / TRAIN, frozenset())
    _refuse_nothing_left(kept)
    if held_out is None:
        kept, validation = _divided(kept, options.held_out, scratch)
    else:
        validation = _read(held_out, published.kind, scratch / VALIDATION, frozenset(kept.prompts))
        if options.held_out is not None:
            rest, validation = _divided(validation, options.held_out, scratch)
            validation.rows = rest.rows
            validation.dropped = rest.dropped + Counter({"not drawn": len(rest.prompts)})
    _refuse_nothing_left(kept)
    _refuse_nothing_left(validation)
    return {TRAIN: kept, VALIDATION: validation}


def _refuse_nothing_left(part: Part) -> None:
    if not part.prompts:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(part.dropped.items()))
        name = "validation" if part.path.name == VALIDATION else "train"
        raise DataError(f"{name}: no row is left of {part.rows:,} ({reasons or 'all held out'}); give other data")


def _check_count(options: argparse.Namespace, split: Split, opened: list[Rows], expect: int | None, flag: str) -> None:
    found, expected = sum(len(part.rows) for part in opened), split.rows if expect is None else expect
    if found == expected:
        return
    place = opened[0].source.name
    text = f"{place}: the split {split.name} has {found:,} rows here, {expected:,} are expected"
    if not options.allow_count:
        raise DataError(f"{text}; get it whole, or say {flag} {found} or --allow-count")
    logger.warning("%s", text)


def _read(opened: list[Rows], kind: Kind, path: Path, avoided: frozenset[bytes]) -> Part:
    """Judge every row; those that are kept go to ``path`` in their order."""
    part = Part(path)
    seen: set[bytes] = set()
    total = sum(len(rows.rows) for rows in opened)
    with path.open("w", encoding="utf-8") as file, tqdm(total=total, desc=path.stem, unit="row", disable=None) as bar:
        for rows in opened:
            for index, raw in enumerate(rows.rows):
                bar.update()
                judged = _judged(rows, raw, index, kind, part)
                if isinstance(judged, Kept) and judged.whole in seen:
                    judged = REPEATED
                elif isinstance(judged, Kept) and judged.prompt in avoided:
                    judged = IN_TRAIN
                if isinstance(judged, str):
                    part.dropped[judged] += 1
                    continue
                seen.add(judged.whole)
                part.prompts.append(judged.prompt)
                file.write(judged.line + "\n")
    part.rows = total
    unreadable = part.dropped[UNREADABLE]
    if unreadable > UNREADABLE_SHARE * total:
        raise DataError(f"{part.complaints[0]} ({unreadable:,} of {total:,} rows cannot be read)")
    for complaint in part.complaints:
        logger.warning("left out: %s", complaint)
    part.dropped = +part.dropped
    return part


def _judged(rows: Rows, raw: dict[str, Any], index: int, kind: Kind, part: Part) -> Kept | str:
    origin, row = read_row(rows.source, raw, index)
    try:
        return read(row, origin, kind)
    except DataError as error:
        if len(part.complaints) < SHOWN:
            part.complaints.append(str(error))
        return UNREADABLE


def _divided(part: Part, wanted: int, scratch: Path) -> tuple[Part, Part]:
    """What stays, and whole prompts of ``wanted`` rows or a few more, drawn by their digests: always the same ones."""
    counts = Counter(part.prompts)
    drawn: set[bytes] = set()
    rows = 0
    for prompt in sorted(counts):
        if rows >= wanted:
            break
        drawn.add(prompt)
        rows += counts[prompt]
    if rows < wanted:
        raise DataError(f"--held-out {wanted}: only {rows:,} rows are there to draw from; give fewer")
    stay = Part(scratch / "stay.jsonl", part.rows, dropped=part.dropped)
    go = Part(scratch / "go.jsonl")
    with (
        part.path.open(encoding="utf-8") as lines,
        stay.path.open("w", encoding="utf-8") as first,
        go.path.open("w", encoding="utf-8") as second,
    ):
        for prompt, line in zip(part.prompts, lines, strict=True):
            side, file = (go, second) if prompt in drawn else (stay, first)
            side.prompts.append(prompt)
            file.write(line)
    go.rows = len(go.prompts)
    return stay, go


def _summary(options: argparse.Namespace, published: Published, parts: dict[str, Part]) -> dict[str, Any]:
    files = {}
    for name, part in parts.items():
        with part.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = {
            "rows_read": part.rows,
            "rows": len(part.prompts),
            "prompts": len(set(part.prompts)),
            "dropped": dict(sorted(part.dropped.items())),
            "sha256": digest,
        }
    source = options.source or published.hub
    splits = {split.name: split.rows for split in (published.train, published.held_out)}
    return {"dataset": options.dataset, "source": source, "published_rows": splits, "files": files}


def _line(counts: dict[str, Any]) -> str:
    dropped = ", ".join(f"{reason}: {count:,}" for reason, count in counts["dropped"].items()) or "none dropped"
    return f"{counts['rows']:,} of {counts['rows_read']:,} rows with {counts['prompts']:,} prompts ({dropped})"


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(
        f"  {name:<25}{data.hub}: " + ", ".join(f"{split.rows:,} {split.name}" for split in (data.train, data.held_out))
        for name, data in DATASETS.items()
    )
    parser = argparse.ArgumentParser(
        description="Turn a published data set into train.jsonl and validation.jsonl.",
        epilog=f"data sets:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=list(DATASETS), metavar="DATASET", help="one of those below")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder to write to")
    parser.add_argument("--source", help="a folder with files of the splits, a file, or another hub name")
    parser.add_argument("--held-out", type=int, metavar="N", help="rows of validation.jsonl; default: the whole split")
    parser.add_argument("--expect", type=int, metavar="N", help="rows of the training split, instead of the published")
    parser.add_argument("--expect-held-out", type=int, metavar="N", help="the same of the held-out split")
    parser.add_argument("--allow-count", action="store_true", help="another number of rows is a warning, not an error")
    return parser


if __name__ == "__main__":
    configure_logging(0)
    try:
        sys.exit(main())
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(failures.report(error))
