"""A benchmark's rows: what a row says, and its table, JSON, CSV."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PACKAGES = ("torch", "megatron-core", "transformers", "triton", "liger-kernel", "nvidia-modelopt")
CPU_INFO = Path("/proc/cpuinfo")
EXTENSIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def device_line(device: str) -> str:
    """The hardware in words."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def _processor() -> str:
    if not CPU_INFO.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in CPU_INFO.read_text().split("\n\n")[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = known.get("flags", "").split()
    widest = next((name for name in EXTENSIONS if name in flags), "")
    return f"{known.get('model name', platform.machine())} {widest}".strip()


def versions() -> str:
    """Python's and the compared packages' versions; packages that aren't installed are left out."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def write_json(rows: Sequence[Row], target: str) -> None:
    """To a file, or to standard output where ``target`` is ``-``."""
    text = json.dumps(rows, indent=1)
    if target == "-":
        print(text)
    else:
        _prepared(target).write_text(text + "\n")


def write_csv(rows: Sequence[Row], target: str) -> None:
    """One line a row; columns in the order in which rows first have them."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with _prepared(target).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def read_csv(source: str) -> list[Row]:
    """The rows of an earlier run: numbers where they are numbers, None where a cell is empty."""
    if not Path(source).exists():
        return []
    with Path(source).open(newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def merged(earlier: Sequence[Row], now: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """The earlier rows, those measured again with their new values. What wasn't measured this time stays."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in keys)

    known = {key(row): row for row in earlier}
    for row in now:
        previous = known.get(key(row), {})
        kept = {name: previous.get(name) if value is None else value for name, value in row.items()}
        known[key(row)] = kept | {"error": row.get("error")}
    return list(known.values())


def _prepared(target: str) -> Path:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else f"{value:.6g}" if isinstance(value, float) else value


def _value(text: str) -> Any:
    if not text:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return json.loads(text) if text.startswith("{") else text


def print_table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> None:
    """``columns``: heading → (field, format). A row with an error shows it in place of its figures."""
    lines = [list(columns)]
    for row in rows:
        cells = []
        for field, style in columns.values():
            value = row.get(field)
            cells.append("-" if value is None else format(value, style))
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    beside: list[Row | None] = [None, *rows]
    for line, of_line in zip(lines, beside, strict=True):
        text = "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        print(text + (f"  {of_line['error']}" if of_line and of_line.get("error") else ""))
    sys.stdout.flush()
