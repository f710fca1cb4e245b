"""Charts: lines, bands and bars where they belong, texts as texts, the same file for the same figures."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from megatron_aligndistil.report.chart import Axes, bar_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"
AXES = Axes("title", "x", "y")
SERIES = {"plain": [(0.0, 1.0), (2.0, 1.0)], "banded": [(0.0, 0.0), (1.0, 2.0), (2.0, 3.0)]}
BAND = [(0.0, -1.0, 1.0), (1.0, 1.0, 3.0), (2.0, 2.0, 4.0)]


def group(svg: str, name: str) -> ElementTree.Element | None:
    return next((g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.get("id") == name), None)


def pixels(element: ElementTree.Element) -> list[tuple[float, float]]:
    path = next(element.iter(f"{SVG}path")).attrib["d"]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)]


def texts(svg: str) -> set[str | None]:
    return {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


def test_lines_run_through_their_points() -> None:
    chart = line_chart({"a & b": [(1, 0.5), (2, 1.5), (3, -0.5)], "c": [(1, 0.0), (3, 1.0)]}, Axes("T", "x", "y"))
    first, second = group(chart, "line-0"), group(chart, "line-1")
    assert first is not None and second is not None and len(pixels(second)) == 2
    x, y = zip(*pixels(first), strict=True)
    assert x[0] < x[1] < x[2] and x[1] == pytest.approx((x[0] + x[2]) / 2, abs=0.1)
    assert y[1] < y[0] < y[2] and y[0] == pytest.approx((y[1] + y[2]) / 2, abs=0.1)  # SVG's y grows downwards


def test_texts_are_texts_even_where_they_look_like_formulas() -> None:
    assert {"T $x$", "a & b", "$5_000$", "x", "y"} <= texts(
        line_chart({"a & b": [(1, 2)], "$5_000$": [(1, 3)]}, Axes("T $x$", "x", "y"))
    )


def test_a_single_point_is_seen() -> None:
    """The points of a long series are not drawn beside its line."""
    chart = line_chart({"a": [(1, 2.0)], "long": [(x, 1.0) for x in range(50)]}, AXES)
    dots = [
        len(list(line.iter(f"{SVG}use"))) for name in ("line-0", "line-1") if (line := group(chart, name)) is not None
    ]
    assert dots == [1, 0]


def test_a_band_is_as_high_as_its_edges_and_in_its_lines_colour() -> None:
    svg = line_chart(SERIES, AXES, {"banded": BAND})
    band, line = group(svg, "band-1"), group(svg, "line-1")
    assert band is not None and line is not None
    colour = re.search(r"stroke: (#\w+)", next(line.iter(f"{SVG}path")).attrib["style"])
    assert colour is not None and colour[1] in next(band.iter(f"{SVG}use")).attrib["style"]
    shift = float(next(band.iter(f"{SVG}use")).attrib["y"])
    outline = [(x, y + shift) for x, y in pixels(band)]
    for x, y in pixels(line):
        edges = [edge for place, edge in outline if place == pytest.approx(x, abs=0.01)]
        assert (min(edges) + max(edges)) / 2 == pytest.approx(y, abs=0.1)
        assert min(edges) < y < max(edges)


def test_without_bands_nothing_changes_and_the_file_is_the_same() -> None:
    assert line_chart(SERIES, AXES) == line_chart(SERIES, AXES, {})
    assert group(line_chart(SERIES, AXES), "band-1") is None


def test_a_band_without_a_line_or_with_a_missing_edge_is_refused() -> None:
    with pytest.raises(ValueError, match="bands without a line: other"):
        line_chart(SERIES, AXES, {"other": BAND})
    with pytest.raises(ValueError, match="not finite"):
        line_chart(SERIES, AXES, {"banded": [(0.0, float("nan"), 1.0)]})


@pytest.mark.parametrize("points", [[], [(0.0, math.nan)]])
def test_a_chart_without_finite_points_is_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="chart 'T'"):
        line_chart({"a": points}, Axes("T", "x", "y"))


def test_bars_name_their_groups_and_series() -> None:
    bars = {"train": {"RM": (0.7, 0.6, 0.8), "DPO": (0.6, math.nan, math.nan)}, "test": {"DPO": (0.5, 0.4, 0.7)}}
    svg = bar_chart(bars, Axes("T", "", "share"))
    assert {"RM", "DPO", "train", "test", "share"} <= texts(svg)
    with pytest.raises(ValueError, match="not finite"):
        bar_chart({"train": {"RM": (math.nan, 0.0, 1.0)}}, AXES)
