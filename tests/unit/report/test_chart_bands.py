"""Bands of a line chart: around their own line, within the axes, and optional."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from megatron_aligndistil.report.chart import BOTTOM, HEIGHT, TOP, Axes, line_chart

AXES = Axes("title", "x", "y")
SERIES = {"plain": [(0.0, 1.0), (2.0, 1.0)], "banded": [(0.0, 0.0), (1.0, 2.0), (2.0, 3.0)]}
BAND = [(0.0, -1.0, 1.0), (1.0, 1.0, 3.0), (2.0, 2.0, 4.0)]


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f"{{http://www.w3.org/2000/svg}}{tag}")


def pixels(element: ElementTree.Element) -> list[tuple[float, ...]]:
    return [tuple(map(float, point.split(","))) for point in element.attrib["points"].split()]


def test_a_band_runs_along_its_upper_edge_and_back_along_its_lower_one() -> None:
    svg = line_chart(SERIES, AXES, {"banded": BAND})
    (polygon,) = elements(svg, "polygon")
    line = elements(svg, "polyline")[1]
    assert polygon.attrib["fill"] == line.attrib["stroke"]
    outline, middle = pixels(polygon), pixels(line)
    for upper, lower, (x, y) in zip(outline[:3], outline[:2:-1], middle, strict=True):
        assert upper[0] == lower[0] == x
        assert (upper[1] + lower[1]) / 2 == pytest.approx(y, abs=0.1)
        assert upper[1] < y < lower[1]


def test_the_axes_hold_the_bands_too() -> None:
    (polygon,) = elements(line_chart(SERIES, AXES, {"banded": BAND}), "polygon")
    heights = [y for _, y in pixels(polygon)]
    assert (min(heights), max(heights)) == (TOP, HEIGHT - BOTTOM)


def test_without_bands_nothing_changes() -> None:
    assert line_chart(SERIES, AXES) == line_chart(SERIES, AXES, {})
    assert not elements(line_chart(SERIES, AXES), "polygon")


def test_a_band_without_a_line_or_with_a_missing_edge_is_refused() -> None:
    with pytest.raises(ValueError, match="bands without a line: other"):
        line_chart(SERIES, AXES, {"other": BAND})
    with pytest.raises(ValueError, match="not finite"):
        line_chart(SERIES, AXES, {"banded": [(0.0, float("nan"), 1.0)]})
