"""Reading the metrics that a training run has logged: one JSON object a line, with ``step`` and ``phase``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_aligndistil.errors import DataError

Metrics = Mapping[str, float | str]


def read_metrics(path: Path) -> list[Metrics]:
    """Every record of a ``metrics.jsonl``; empty where the run logged none.

    Raises:
        DataError: a line isn't a JSON object.
    """
    if not path.is_file():
        return []
    records: list[Metrics] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: not a JSON object: {line[:60]!r}; the run that wrote it was damaged")
        records.append(record)
    return records


def validations(records: Sequence[Metrics]) -> list[Metrics]:
    """The validation records among ``records``, oldest first."""
    return [record for record in records if record.get("phase") == "validation"]


def training_curve(records: Sequence[Metrics], metric: str) -> list[tuple[float, float]]:
    """(step, value) of the training records that have ``metric``."""
    return [
        (float(record["step"]), float(record[metric]))
        for record in records
        if record.get("phase") == "train" and metric in record
    ]
