"""The whole tiny quickstart as a user runs it: four ranks, TP=2 × PP=2, on real Megatron-Core."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from megatron_aligndistil.launch.quickstart_recipe import Folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, str]:
    root = tmp_path_factory.mktemp("quick start") / "out"
    command = [sys.executable, "-m", "megatron_aligndistil", "quickstart", "--tiny", "--output", str(root)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return Folders(root), done.stdout


def test_the_summary_has_its_schema_and_finite_figures(finished: tuple[Folders, str]) -> None:
    summary = json.loads((finished[0].root / "summary.json").read_text())
    assert summary.keys() == {"rows", "seconds"}
    assert [row["model"] for row in summary["rows"]] == ["initial", "dpo", "aligndistil"]
    for row in summary["rows"]:
        assert row.keys() == {"model", "heldout_reward", "property_rate", "kl_to_initial"}
        assert all(math.isfinite(row[name]) for name in row.keys() - {"model"})
        assert 0.0 <= row["property_rate"] <= 1.0
    assert summary["seconds"] > 0


def test_alignment_raises_reward_and_property_away_from_the_initial_model(finished: tuple[Folders, str]) -> None:
    rows = json.loads((finished[0].root / "summary.json").read_text())["rows"]
    initial, dpo, aligndistil = rows
    assert initial["kl_to_initial"] == 0.0
    assert initial["property_rate"] < 0.5
    for aligned in (dpo, aligndistil):
        assert aligned["heldout_reward"] > initial["heldout_reward"]
        assert aligned["property_rate"] > initial["property_rate"]
        assert aligned["kl_to_initial"] > 0.0


def test_the_trainer_and_the_exported_models_agree(finished: tuple[Folders, str]) -> None:
    """The sharded kernels in the trainer, against dense logits of the exported folders: two ways to one number."""
    folders = finished[0]
    rows = {row["model"]: row for row in json.loads((folders.root / "summary.json").read_text())["rows"]}
    lines = folders.metrics("aligndistil").read_text().splitlines()
    logged = [record for record in map(json.loads, lines) if record["phase"] == "validation"]
    for model, record in (("initial", logged[0]), ("aligndistil", logged[-1])):
        assert record["expected_reward"] == pytest.approx(rows[model]["heldout_reward"], rel=1e-3, abs=1e-5)
        assert record["kl_to_initial"] == pytest.approx(rows[model]["kl_to_initial"], rel=1e-3, abs=1e-5)


def test_the_report_and_the_terminal_show_the_table_and_three_questions(finished: tuple[Folders, str]) -> None:
    folders, printed = finished
    report = (folders.root / "report.md").read_text()
    table = next(line for line in report.splitlines() if line.startswith("| aligndistil"))
    assert table in printed
    questions = [line for line in report.splitlines() if line.startswith("- **")]
    assert len(questions) == 3 and all(question in printed for question in questions)
    assert report.count("aligndistil train --config-name") == 3
