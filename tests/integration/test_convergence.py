"""The convergence comparison from training to figure: two objectives and two seeds of the example's own settings."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.program import LIMIT_SECONDS, environment, records, write_model, write_pairs

ROOT = Path(__file__).parents[2]
EXAMPLE, TOOL = ROOT / "examples" / "convergence", ROOT / "tools" / "compare_convergence.py"
STEPS = 5
SECTIONS = {"distributional": "aligndistil", "token_scalar": "pg"}
SEEDS = (1, 2)
SHORT = (
    "model.global_batch_size=4",
    "model.micro_batch_size=4",
    "model.rollout.max_new_tokens=8",
    "model.optim.lr=1e-2",
    f"trainer.max_steps={STEPS}",
)


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the four runs, two at a time."""
    folder = tmp_path_factory.mktemp("convergence")
    model, dpo, reverse = (write_model(folder / name, seed) for seed, name in enumerate(("model", "dpo", "reverse")))
    pairs = write_pairs(folder / "pairs.jsonl", 16)
    for seed in SEEDS:
        started = [
            start(
                *(sys.executable, "-m", "megatron_aligndistil", "train", "--config-dir", str(EXAMPLE)),
                *("--config-name", objective, f"model.restore_from_path={model}", f"model.seed={seed}"),
                *(f"model.{section}.dpo_path={dpo}", f"model.{section}.reverse_dpo_path={reverse}"),
                f"model.data.data_prefix.train=[{pairs}]",
                f"model.data.cache_dir={folder / f'cache_{objective}'}",
                f"exp_manager.explicit_log_dir={folder / objective / f'seed_{seed}'}",
                *SHORT,
            )
            for objective, section in SECTIONS.items()
        ]
        for process in started:
            _, errors = process.communicate(timeout=LIMIT_SECONDS)
            assert process.returncode == 0, errors[-3000:]
    return folder


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(sys.executable, str(TOOL), str(folder), *arguments)
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_both_objectives_start_alike_and_differ_later(runs: Path) -> None:
    """The same model, prompts and seed draw the same responses, whose reward both measure in the same way."""
    for seed in SEEDS:
        fast, slow = (records(runs / objective / f"seed_{seed}") for objective in SECTIONS)
        assert fast[0]["token_reward"] == pytest.approx(slow[0]["token_reward"], rel=1e-4, abs=1e-7)
        assert fast[0]["response_tokens"] == slow[0]["response_tokens"]
        assert fast[-1]["token_reward"] != pytest.approx(slow[-1]["token_reward"], rel=1e-4)
        assert all(record["rollout/off_policy_steps"] == 0 for record in (*fast, *slow))


def test_the_figure_its_points_and_the_table_are_written(runs: Path) -> None:
    finished = compare(runs, "--objectives", *SECTIONS, "--window", "2", "--output", str(runs / "figure"))
    assert finished.returncode == 0, finished.stderr
    text = (runs / "figure" / "convergence.md").read_text()
    assert text.strip() in finished.stdout
    for objective in SECTIONS:
        rewards = [records(runs / objective / f"seed_{seed}")[-1]["token_reward"] for seed in SEEDS]
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {objective} ") and line.count("|") == 5]
        assert f" {sum(rewards) / len(rewards):.4f} " in row
    with (runs / "figure" / "convergence.csv").open() as file:
        points = list(csv.DictReader(file))
    assert [int(point["step"]) for point in points] == [*range(1, STEPS + 1)] * len(SECTIONS)
    assert (runs / "figure" / "convergence.svg").read_text().count('id="line-') == len(SECTIONS)


def test_a_missing_objective_ends_with_one_line(runs: Path) -> None:
    finished = compare(runs, "--window", "2")
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("aligndistil: error: ") and str(runs / "sentence_level") in line


def test_the_script_refuses_a_folder_with_runs_of_other_settings(tmp_path: Path) -> None:
    """Before anything is trained."""
    (tmp_path / "settings.txt").write_text("others\n")
    given = {"MODEL": "m", "DPO": "d", "REVERSE": "r", "PROMPTS": "p", "RUNS": str(tmp_path)}
    finished = subprocess.run(
        [EXAMPLE / "run.sh"], env={**os.environ, **given}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"run.sh: error: RUNS={tmp_path}")
