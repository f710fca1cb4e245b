"""The miniature's table, files, chart and sentences on figures that are known."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_aligndistil.report.paper_mini import (
    TABLE_4,
    Figures,
    Results,
    answers_table,
    chart,
    orders,
    report,
    summary,
    table,
    write,
)

TITLES = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "ppo": "PPO"}


def figures(reward: float, win_rate: float, score: float) -> Figures:
    return Figures(
        *(reward, win_rate, score),
        *(reward / 10, 40.0),  # KL, length
        *(0.25, 1.5, 0.5, 2.0, 1.0, 0.75),  # warm, tips, polite, others, ended, agreement
        *(50.0, 10.0),  # seconds, and before
    )


def results(seeds: int = 2) -> Results:
    """Over seeds 1, 2: true rewards r, r + 1; the reward model's zero moves by 5 between them."""
    by_method = {"sft": (1.0, 0.5, 0.0), "dpo": (2.0, 0.7, 2.0), "kto": (1.5, 0.6, 1.0), "ppo": (3.0, 0.6, 3.0)}
    found = {
        name: {seed: figures(reward + seed - 1, rate, score + 5 * seed) for seed in range(1, seeds + 1)}
        for name, (reward, rate, score) in by_method.items()
    }
    return Results(TITLES, found, ["a note"], {"steps": 8})


def cells(text: str, method: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {method} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_means_errors_and_the_papers_figures() -> None:
    text = table(results())
    assert cells(text, "DPO") == [
        *("DPO", "2.50 ± 0.50", "70.0 ± 0.0", "2.00 ± 0.00", "0.250 ± 0.050", "40.0 ± 0.0", "50 ± 0", "10 ± 0"),
        *("85.7", "1.12"),  # 1.67 - 0.55
    ]
    assert cells(text, "KTO")[-2:] == ["", ""]
    assert cells(text, "SFT")[3] == "0.00 ± 0.00"  # whatever the zero of a seed's reward model is


def test_the_answers_are_told_apart() -> None:
    text = answers_table(results(seeds=1))
    assert cells(text, "DPO") == ["DPO", "25", "1.50", "50", "2.00", "100", "75"]


def test_one_seed_has_no_error() -> None:
    text = table(results(seeds=1))
    assert cells(text, "PPO")[1] == "3.00"
    assert "±" not in text and "nan" not in report(results(seeds=1))


def test_orders_other_than_the_papers_are_told() -> None:
    win_rate, reward = orders(results()).splitlines()
    assert win_rate == ("- Win rate: in 1 of 3 pairs of its methods: DPO is above PPO by 10.00 ± 0.00 points.")
    assert reward == "- Reward model: in none of 3 pairs of its methods."
    assert orders(results(seeds=1)).splitlines()[0].endswith("DPO is above PPO by 10.00 points, one seed.")


def test_a_difference_within_its_noise_is_told_as_such() -> None:
    own = results()
    noisy = {1: figures(3.0, 0.9, 3.0), 2: figures(3.0, 0.4, 3.0)}  # beside DPO's 0.7: 0.2 and -0.3
    text = orders(Results(TITLES, {**own.figures, "ppo": noisy}, [], {}))
    assert "DPO is above PPO by 5.00 ± 25.00 points, within two standard errors." in text


def test_without_a_pair_of_the_papers_there_is_no_order() -> None:
    own = results()
    alone = Results({"sft": "SFT", "kto": "KTO"}, {name: own.figures[name] for name in ("sft", "kto")}, [], {})
    assert "no two of its methods were trained" in orders(alone)


def test_the_papers_table_is_copied_right() -> None:
    rows = {name: (f"{100 * row.win_rate:.1f}", row.reward) for name, row in TABLE_4.items()}
    assert rows == {
        "sft": ("50.0", 0.55),
        "dpo": ("85.7", 1.67),
        "ppo": ("87.7", 2.22),
        "rto": ("90.8", 1.98),
        "aligndistil": ("92.8", 2.28),
        "aligndistil_on_policy": ("92.5", 2.46),
    }


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_chart_has_a_point_for_each_method(seeds: int) -> None:
    root = ElementTree.fromstring(chart(results(seeds)))
    groups = {group.get("id") for group in root.iter("{http://www.w3.org/2000/svg}g")}
    assert {f"point-{index}" for index in range(4)} <= groups
    assert set(TITLES.values()) <= {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}


def test_files_hold_every_seed(tmp_path: Path) -> None:
    write(results(), tmp_path)
    with (tmp_path / "paper_mini.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    (row,) = [row for row in rows if (row["method"], row["seed"]) == ("ppo", "2")]
    assert (float(row["true_reward"]), float(row["model_reward"]), float(row["seconds"])) == (4.0, 13.0, 50.0)
    held = json.loads((tmp_path / "paper_mini.json").read_text())
    assert held["methods"]["dpo"]["means"]["true_reward"] == {"mean": 2.5, "standard_error": pytest.approx(0.5)}
    assert held["methods"]["dpo"]["means"]["reward_gain"]["mean"] == 2.0
    assert held["methods"]["dpo"]["seeds"]["1"]["win_rate"] == 0.7
    assert held["methods"]["kto"]["paper_table_4"] is None and held["settings"] == {"steps": 8}
    text = (tmp_path / "paper_mini.md").read_text()
    assert "a note" in text and "paper_mini.svg" in text and (tmp_path / "paper_mini.svg").is_file()


def test_the_error_of_one_seed_is_null_in_json() -> None:
    means = summary(results(seeds=1))["methods"]["dpo"]["means"]  # type: ignore[index]
    assert means["true_reward"] == {"mean": 2.0, "standard_error": None}
    assert math.isfinite(means["reward_gain"]["mean"])
