"""``metrics.jsonl``: a resumed run goes on whatever is in it; a report reads it, or names the line."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_aligndistil.report.run_metrics import read_metrics, training_curve, validations
from megatron_aligndistil.trainer.reporting import kept_lines
from tests.fuzz.mutations import spoiled_bytes, spoiled_json
from tests.fuzz.reader import Reader

RECORDS = [
    {"step": step, "phase": phase, "loss": 0.7, "lr": 1e-6, "grad_norm": float("nan")}
    for step in (1, 2, 3)
    for phase in ("train", "validation")
]


def test_metrics(record, tmp_path: Path) -> None:
    reader, file = Reader("metrics.jsonl"), tmp_path / "metrics.jsonl"
    lines = [json.dumps(record) for record in RECORDS]
    text = "\n".join(lines) + "\n"
    one_line = spoiled_json(RECORDS).map(
        lambda line: "\n".join([*lines[:3], line, *lines[3:]]).encode("utf-8", "surrogatepass")
    )

    def check(content: bytes) -> None:
        file.write_bytes(content)
        kept = kept_lines(file, steps=2)
        assert all(json.loads(line)["step"] <= 2 and line.count("\n") == 1 for line in kept)
        reader.read(lambda: _read(file), f"{file}:")

    record(reader.fuzz(one_line | spoiled_bytes([text.encode(), b"\xef\xbb\xbf" + text.encode(), b""]), check))


def _read(file: Path) -> None:
    records = read_metrics(file)
    validations(records)
    training_curve(records, "loss")


def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record) for record in RECORDS]
    file.write_bytes("\n".join([lines[0], "[" * 100_000, "\x00", *lines[1:]]).encode() + b'\n{"step": 2')
    assert kept_lines(file, steps=2) == [f"{line}\n" for line in lines[:4]]
