"""Reading the metrics that a training run has logged: one JSON object a line, with ``step`` and ``phase``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_aligndistil.config.json_text import parse_json
from megatron_aligndistil.errors import DataError

Metrics = Mapping[str, float | str]


def read_metrics(path: Path) -> list[Metrics]:
    """Every record of a ``metrics.jsonl``; empty where the run logged none.

    Raises:
        DataError: a line isn't a JSON object of a step, a phase and numbers.
    """
    if not path.is_file():
        return []
    records: list[Metrics] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = parse_json(line.decode("utf-8"))
        except ValueError:
            record = None
        if not isinstance(record, dict) or not _is_record(record):
            shown = line[:60].decode("utf-8", "replace")
            raise DataError(f"{path}:{number}: not a record of metrics: {shown!r}; the run that wrote it was damaged")
        records.append(record)
    return records


def _is_record(record: Mapping[str, object]) -> bool:
    numbers = (value for name, value in record.items() if name != "phase")
    return "step" in record and all(type(value) in (int, float) for value in numbers)


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
