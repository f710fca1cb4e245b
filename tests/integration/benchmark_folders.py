"""Small benchmark folders of a test's own making."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.launch.benchmark_files import write_rows
from tests.unit.launch.test_evaluate_alpaca_eval import made_outputs, write_benchmark
from tests.unit.launch.test_evaluate_arena_hard import BASELINE, QUESTIONS
from tests.unit.launch.test_evaluate_mt_bench import TABLES


def write_mt_bench(folder: Path) -> Path:
    """Two questions of two turns."""
    for name, rows in TABLES.items():
        write_rows(folder / name, rows)
    return folder


def write_arena_hard(folder: Path) -> Path:
    """Two questions and the baseline's answers."""
    write_rows(folder / "question.jsonl", QUESTIONS)
    write_rows(folder / "model_answer" / "gpt-4-0314.jsonl", BASELINE)
    return folder


def write_alpaca_eval(folder: Path) -> Path:
    """All 805 rows, and a model's outputs."""
    folder.mkdir()
    write_benchmark(folder)
    (folder / "model_outputs.json").write_text(json.dumps(made_outputs("short", 700)))
    return folder
