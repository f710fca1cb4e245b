"""The miniature as a user runs it: one seed, two methods, a few steps, from random weights to the table."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.program import environment

TOOL = Path(__file__).parents[2] / "tools" / "paper_mini.py"
LIMIT_SECONDS = 800
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * LIMIT_SECONDS)]
SMALL = ("--seeds", "1", "--methods", "sft,dpo", "--steps", "8", "--base-steps", "8")


def start(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--output", str(output), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=LIMIT_SECONDS, check=False
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "mini"
    finished = start(folder, *SMALL)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert (folder / "paper_mini.md").read_text().strip() in finished.stdout
    return folder


def test_the_table_is_that_of_the_models_trained(output: Path) -> None:
    methods = json.loads((output / "paper_mini.json").read_text())["methods"]
    assert list(methods) == ["sft", "dpo"]
    for method in methods.values():
        assert all(math.isfinite(mean["mean"]) for mean in method["means"].values())
    sft, dpo = (method["means"] for method in methods.values())
    assert sft["win_rate"]["mean"] == 0.5 and sft["kl_to_sft"]["mean"] == 0.0
    assert dpo["kl_to_sft"]["mean"] > 0.0
    for name in ("base", "sft/seed_1", "dpo/seed_1", "reward_model/seed_1"):
        record = json.loads((output / name / "ended.json").read_text())
        assert record["command"].startswith("aligndistil train --config-dir ") and record["cpu_seconds"] > 0
    assert dpo["seconds"]["mean"] == record_of(output / "dpo" / "seed_1")["cpu_seconds"]
    with (output / "paper_mini.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["sft", "dpo"]
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    mean = sum(row["true_reward"] for row in answers if row["method"] == "dpo") / (len(answers) / 2)
    assert mean == pytest.approx(dpo["true_reward"]["mean"])


def test_a_second_start_trains_nothing_and_finds_the_same(output: Path) -> None:
    before = (output / "paper_mini.json").read_text()
    again = start(output, *SMALL)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "0 of 3 runs to train" in again.stdout
    assert (output / "paper_mini.json").read_text() == before


def test_other_settings_want_another_folder(output: Path) -> None:
    refused = start(output, *SMALL[:-4], "--steps", "16", "--base-steps", "8")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"aligndistil: error: --output {output}: holds runs with other settings")


def record_of(folder: Path) -> dict[str, float]:
    record: dict[str, float] = json.loads((folder / "ended.json").read_text())
    return record
