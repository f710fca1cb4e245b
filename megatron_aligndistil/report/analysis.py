"""What an analysis leaves in its folder: tables for people (Markdown) and programs (CSV), charts, its settings."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.evaluation.intervals import Estimate
from megatron_aligndistil.report.table import markdown_table

SETTINGS_FILE = "settings.json"
NONE = "-"

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Texts under a header; ``title`` stands above it where there are several."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Report:
    """An analysis's results.

    name     of its files
    columns  of the CSV, whose ``records`` hold plain numbers
    charts   file name → SVG; they are shown between tables and notes
    files    further ones, file name → text
    """

    name: str
    title: str
    tables: Sequence[Table]
    columns: Sequence[str]
    records: Sequence[Sequence[Cell]]
    charts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def markdown(self) -> str:
        """Title, tables, charts and notes."""
        parts = [f"# {self.title}"]
        for table in self.tables:
            parts += [f"## {table.title}"] if table.title else []
            parts.append(markdown_table(table.header, table.rows))
        parts += [f"![{self.title}]({file})" for file in self.charts]
        return "\n\n".join([*parts, *self.notes]) + "\n"

    @property
    def csv(self) -> str:
        """The records; a missing value and NaN are empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_csv_cell(cell) for cell in record] for record in self.records)
        return text.getvalue()

    def with_chart(self, file: str, svg: str) -> Report:
        """With one more chart."""
        return replace(self, charts={**self.charts, file: svg})

    def write(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """All files into ``folder``, each atomically, ``settings`` as settings.json last."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = {**self.charts, **self.files, f"{self.name}.csv": self.csv, f"{self.name}.md": self.markdown}
        for file, text in whole.items():
            write_text(folder / file, text)
        write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def percent(estimate: Estimate | None) -> str:
    """``71.2 [66.2, 75.7]``."""
    return _text(estimate, 100.0, 1)


def number(estimate: Estimate | None, digits: int = 3) -> str:
    """``1.234 [1.100, 1.368]``."""
    return _text(estimate, 1.0, digits)


def csv_cells(estimate: Estimate | None) -> tuple[Cell, Cell, Cell]:
    """Value and interval."""
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)


def _text(estimate: Estimate | None, scale: float, digits: int) -> str:
    if estimate is None or math.isnan(estimate.value):
        return NONE
    value = f"{scale * estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return value
    return f"{value} [{scale * estimate.low:.{digits}f}, {scale * estimate.high:.{digits}f}]"


def _csv_cell(cell: Cell) -> str | int:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return f"{cell:.8g}" if isinstance(cell, float) else cell
