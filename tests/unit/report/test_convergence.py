"""Final rewards, first steps that pass them and their ratios, on curves whose numbers are known."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_aligndistil.errors import DataError
from megatron_aligndistil.report.convergence import (
    NOT_REACHED,
    NOT_RISEN,
    Curves,
    main,
    mean_and_error,
    read_curves,
    report,
    speeds,
)

TOOL = Path(__file__).parents[3] / "tools" / "compare_convergence.py"
STEPS = 20


def write_run(folder: Path, values: list[float], metric: str = "token_reward") -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "phase": "train", metric: value}) for step, value in enumerate(values, start=1)]
    lines.append(json.dumps({"step": len(values), "phase": "validation", metric: 99.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def ramp(slope: float, offset: float = 0.0) -> list[float]:
    """slope · step + offset."""
    return [slope * step + offset for step in range(1, STEPS + 1)]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """fast rises twice as steeply as slow; the seeds differ by 0.2."""
    for seed in (3, 10):
        write_run(tmp_path / "fast" / f"seed_{seed}", ramp(2.0, seed / 35))
        write_run(tmp_path / "slow" / f"seed_{seed}", ramp(1.0, seed / 35))
    return tmp_path


def curves_of(window: int, **rewards: list[list[float]]) -> Curves:
    arrays = {name: np.array(values) for name, values in rewards.items()}
    seeds, steps = next(iter(arrays.values())).shape
    return Curves("r", range(seeds), range(1, steps + 1), arrays, window)


def test_a_point_averages_the_window_up_to_it() -> None:
    curves = curves_of(3, fast=[[3.0, 6.0, 0.0, 9.0, 3.0]])
    assert curves.smoothed("fast").tolist() == [pytest.approx([3.0, 4.5, 3.0, 5.0, 4.0])]


@pytest.mark.parametrize("window", [1, 2, 5, STEPS])
def test_smoothing_is_the_plain_mean_for_every_window(window: int) -> None:
    values = np.random.default_rng(0).normal(size=(2, STEPS))
    smoothed = curves_of(window, fast=values.tolist()).smoothed("fast")
    for step in range(STEPS):
        expected = values[:, max(0, step + 1 - window) : step + 1].mean(axis=1)
        np.testing.assert_allclose(smoothed[:, step], expected, atol=1e-12)


def test_the_final_reward_is_that_of_the_last_tenth(runs: Path) -> None:
    curves = read_curves(runs, ("fast", "slow"), "token_reward", 1)
    assert curves.seeds == [3, 10]
    assert curves.final("slow") == pytest.approx([19.5 + 3 / 35, 19.5 + 10 / 35])


def test_a_curve_of_double_slope_is_twice_as_fast(runs: Path) -> None:
    curves = read_curves(runs, ("fast", "slow"), "token_reward", 1)
    for speed in speeds(curves, "fast", "slow"):
        assert (speed.step, speed.own_step) == (10, STEPS)  # 2 · 10 is the first to pass 19.5


def test_a_window_passes_later_since_it_only_knows_the_past(runs: Path) -> None:
    curves = read_curves(runs, ("fast", "slow"), "token_reward", 3)
    assert [speed.step for speed in speeds(curves, "fast", "slow")] == [11, 11]


def test_no_step_before_the_first_whole_window_counts() -> None:
    curves = curves_of(4, fast=[[9.0] * 10], slow=[[0.0] * 9 + [5.0]])
    (speed,) = speeds(curves, "fast", "slow")
    assert speed.step == 4


def test_what_is_not_reached_and_what_has_not_risen_is_said(tmp_path: Path) -> None:
    curves = curves_of(2, fast=[ramp(0.5), ramp(0.5)], slow=[ramp(1.0), ramp(-1.0)])
    assert [speed.verdict for speed in speeds(curves, "fast", "slow")] == [NOT_REACHED, NOT_RISEN]
    text = report(curves)
    assert f"{NOT_REACHED} |" in text and f"{NOT_RISEN} |" in text
    assert "nan" not in text


def test_an_objective_that_stands_still_is_compared_with_its_own_step_too() -> None:
    """The ratio to the end of training would grow with every further step; the one to its own step doesn't."""
    slow = [*ramp(1.0)[:10], *[10.0] * 10]
    curves = curves_of(1, fast=[ramp(2.0)] * 2, slow=[slow] * 2)
    for speed in speeds(curves, "fast", "slow"):
        assert (speed.target, speed.own_step, speed.step) == (10.0, 10, 5)
    cells = [cell.strip() for cell in report(curves).splitlines()[-3].split("|")]
    assert cells[1:3] == ["slow", "mean"] and cells[6:8] == ["4.00 ± 0.00", "2.00 ± 0.00"]


def test_a_mean_over_some_seeds_says_how_many() -> None:
    fast, slow = [ramp(2.0), ramp(2.0), ramp(0.5)], [ramp(1.0)] * 3
    text = report(curves_of(1, fast=fast, slow=slow))
    assert text.count(" 2.00 ± 0.00 (2 of 3 seeds) |") == 1 + 1


def test_standard_errors_are_of_the_mean() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1.0 / math.sqrt(3)))
    assert math.isnan(mean_and_error([1.0])[1])


def test_the_program_writes_a_chart_its_points_and_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--objectives", "fast", "slow", "--window", "1", "--output", str(runs / "figure")]) == 0
    printed = capsys.readouterr().out
    figure = runs / "figure"
    text = (figure / "convergence.md").read_text()
    assert text.strip() in printed
    assert "2.00 ± 0.00" in text
    rows = list(csv.DictReader((figure / "convergence.csv").open()))
    assert [row["objective"] for row in rows] == ["fast"] * STEPS + ["slow"] * STEPS
    assert float(rows[4]["mean"]) == pytest.approx(10 + 6.5 / 35)
    assert float(rows[4]["se"]) == pytest.approx(0.1)  # |difference| / 2 for two values
    svg = ElementTree.parse(figure / "convergence.svg").getroot()
    drawn = {group.get("id") for group in svg.iter("{http://www.w3.org/2000/svg}g")}
    assert {"line-0", "line-1", "band-0", "band-1"} <= drawn


def refused(folder: Path, *arguments: str) -> str:
    """The one line of an error, with which the program ends."""
    command = [sys.executable, str(TOOL), str(folder), "--objectives", "fast", "slow", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert not (folder / "convergence.md").exists()
    return line


def test_the_program_ends_with_one_line(runs: Path) -> None:
    (runs / "slow" / "seed_10" / "metrics.jsonl").unlink()
    line = refused(runs)
    assert line.startswith("aligndistil: error: ")
    assert "slow/seed_10/metrics.jsonl" in line


def test_missing_objectives_seeds_metrics_and_steps_are_named(runs: Path) -> None:
    def message(*objectives: str, metric: str = "token_reward", window: int = 1) -> str:
        with pytest.raises(DataError) as error:
            read_curves(runs, objectives, metric, window)
        return str(error.value)

    assert "no runs" in message("fast", "other")
    assert "no training record has loss" in message("fast", "slow", metric="loss")
    assert "--window 21" in message("fast", "slow", window=STEPS + 1)
    assert "--window 0" in message("fast", "slow", window=0)
    write_run(runs / "short" / "seed_3", ramp(1.0))
    assert "seeds 3, but fast 3, 10" in message("fast", "short")
    assert "seed 3 only" in message("short")
    write_run(runs / "short" / "seed_10", ramp(1.0)[:-1])
    assert "short/seed_10: has logged 19 steps up to 19, another run 20" in message("fast", "short")
    write_run(runs / "wild" / "seed_3", ramp(1.0))
    write_run(runs / "wild" / "seed_10", [*ramp(1.0)[:-1], math.nan])
    assert "nan at step 20" in message("fast", "wild")
