"""Tables, charts and reports say exactly what they were given."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_aligndistil.errors import DataError
from megatron_aligndistil.report import quickstart as quickstart_report
from megatron_aligndistil.report.quickstart import CrossCheck, Example, ModelRow, QuickstartResult, Stage
from megatron_aligndistil.report.run_metrics import read_metrics, training_curve, validations
from megatron_aligndistil.report.table import markdown_table

ROWS = [
    ModelRow("initial", 0.0014, 0.04, 0.0),
    ModelRow("dpo", 0.0181, 0.75, 0.045, 80.4),
    ModelRow("aligndistil", -0.0281, 1.0, 0.225, 60.0),
]
SVG = "{http://www.w3.org/2000/svg}"


def _result(rows: list[ModelRow]) -> QuickstartResult:
    return QuickstartResult(
        model="a model",
        property_rule="the rule holds",
        heldout="24 answers",
        rows=rows,
        examples=[Example("How?", {"initial": "So\n\nand so.", "dpo": "Glad you ask."})],
        cross_checks=[CrossCheck("initial", "expected_reward", 0.1234, 0.1235)],
        stages=[Stage("DPO", 80.4, "aligndistil train --config-name dpo")],
        seconds=400.04,
        charts={"Loss": "loss.svg"},
    )


def test_columns_align_and_figures_are_to_the_right() -> None:
    table = markdown_table(("model", "rate"), [("a", "5%"), ("longer name", "100%")])
    assert table.splitlines() == [
        "| model       | rate |",
        "| ----------- | ---: |",
        "| a           |   5% |",
        "| longer name | 100% |",
    ]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        markdown_table(("a", "b"), [("1",)])


def test_the_summary_has_the_promised_keys_and_nothing_else(tmp_path: Path) -> None:
    quickstart_report.write(_result(ROWS), tmp_path)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {
        "rows": [
            {"model": "initial", "heldout_reward": 0.0014, "property_rate": 0.04, "kl_to_initial": 0.0},
            {"model": "dpo", "heldout_reward": 0.0181, "property_rate": 0.75, "kl_to_initial": 0.045},
            {"model": "aligndistil", "heldout_reward": -0.0281, "property_rate": 1.0, "kl_to_initial": 0.225},
        ],
        "seconds": 400.0,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "summary.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="dpo: a figure isn't finite"):
        quickstart_report.summary([ModelRow("dpo", 0.1, 0.5, value)], 1.0)


def test_the_report_shows_rows_answers_checks_and_commands() -> None:
    text = quickstart_report.report(_result(ROWS))
    assert "| aligndistil |                 -0.0281 |            100% |        0.2250 |                  60 |" in text
    assert "| initial     |                  0.0014 |              4% |        0.0000 |                   - |" in text
    assert "  - *initial:* So and so.\n  - *dpo:* Glad you ask." in text
    assert "| initial | expected_reward |  0.1234 |         0.1235 |" in text
    assert "- DPO: 80 s\n\n  ```sh\n  aligndistil train --config-name dpo\n  ```" in text
    assert "![Loss](loss.svg)" in text


def test_metrics_are_read_by_phase(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [
        {"step": 0, "phase": "validation", "expected_reward": 0.1},
        {"step": 1, "phase": "train", "loss": 0.7},
        {"step": 2, "phase": "train", "grad_norm": 1.0},
        {"step": 2, "phase": "validation", "expected_reward": 0.2},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = read_metrics(path)
    assert read == records
    assert [record["step"] for record in validations(read)] == [0, 2]
    assert training_curve(read, "loss") == [(1.0, 0.7)]


def test_a_missing_file_has_no_metrics_and_a_broken_line_is_named(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path / "metrics.jsonl")
