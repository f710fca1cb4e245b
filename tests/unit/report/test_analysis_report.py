"""Files of an analysis, and the heat map."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np

from megatron_aligndistil.evaluation.intervals import Estimate
from megatron_aligndistil.report.analysis import Report, Table, csv_cells, number, percent
from megatron_aligndistil.report.token_heat_map import ShownResponse, heat_map


def test_estimates_are_shown_with_their_intervals() -> None:
    assert percent(Estimate(0.7119, 0.662, 0.757)) == "71.2 [66.2, 75.7]"
    assert number(Estimate(1.5, math.nan, math.nan), 1) == "1.5"
    assert number(None) == number(Estimate(math.nan, math.nan, math.nan)) == "-"
    assert csv_cells(None) == (None, None, None)


def test_a_report_is_a_folder_of_whole_files(tmp_path: Path) -> None:
    tables = [Table(("model", "x"), [("a", "1")], "First"), Table(("model", "y"), [("b", "2")])]
    records = [("a, b", 0.123456789, None, math.nan, 3)]
    report = Report(
        "name", "Title", tables, tuple("mvnxi"), records, {"name.svg": "<svg/>"}, ["A note."], {"more.txt": "t"}
    )
    report.write(tmp_path / "new" / "folder", {"β": 1})
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        "more.txt",
        "name.csv",
        "name.md",
        "name.svg",
        "settings.json",
    ]
    with (folder / "name.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [list("mvnxi"), ["a, b", "0.12345679", "", "", "3"]]
    text = (folder / "name.md").read_text()
    assert text.startswith("# Title\n\n## First\n\n| model |") and "![Title](name.svg)\n\nA note.\n" in text
    assert json.loads((folder / "settings.json").read_text()) == {"β": 1}


def test_the_heat_map_colours_by_magnitude_and_sign_and_escapes() -> None:
    own = ShownResponse("f:1", "<b>", ["a<", " ", "\n"], {"reward": np.array([1.0, -2.0, 0.0])})
    page = heat_map([own], "reward", {"reward": "r"})
    assert "<b>" not in page and "&lt;b&gt;" in page and "a&lt;" in page
    assert "rgba(31,111,235,0.500)" in page and "rgba(209,73,91,1.000)" in page and "rgba(31,111,235,0.000)" in page
    assert 'title="r -2"' in page and page.count("<span ") == 3
    assert "NaN" not in heat_map([ShownResponse("f:1", "", ["x"], {"reward": np.zeros(1)})], "reward", {"reward": "r"})
