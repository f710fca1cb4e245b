"""Charts as SVG, drawn by matplotlib, which is imported only when one is."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
Band = Sequence[tuple[float, float, float]]  # x, lower edge, upper edge
Bars = Mapping[str, tuple[float, float, float]]  # group → height, lower and upper end of its whisker

INCHES = (8.0, 4.5)
BAND_OPACITY = 0.18
COLOURS = ("#1f6feb", "#d1495b", "#2e933c", "#8a5cf6", "#b8860b", "#0f8b8d", "#6c757d")
MARKERS = ("o", "s", "^", "D")  # another one where the colours begin again
DOTTED_POINTS = 12
LABEL_CHARACTERS = 16  # of a line under a group of bars
BARS_WIDTH = 0.8  # of a group's, whose places are 1 apart
# Texts stay texts, and the same chart is the same file.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aligndistil",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Axes:
    """What the chart says around its lines."""

    title: str
    x_label: str
    y_label: str


@dataclass(frozen=True)
class Point:
    """A dot of ``points_chart``; errors reach to either side."""

    x: float
    y: float
    x_error: float
    y_error: float


def line_chart(series: Mapping[str, Points], axes: Axes, bands: Mapping[str, Band] | None = None) -> str:
    """An SVG document with one line a series, and a shaded band in its colour around each that ``bands`` has.

    The points of a series of few are dots. In the document a line's group has the id "line-<number>", a band's
    "band-<number>".

    Raises:
        ValueError: there is no point, one isn't finite, or a band belongs to no series.
    """
    bands = bands or {}
    if stray := sorted(bands.keys() - series.keys()):
        raise ValueError(f"chart {axes.title!r}: bands without a line: {', '.join(stray)}")
    values = [value for line in series.values() for point in line for value in point]
    _check_finite(axes, values, [value for band in bands.values() for point in band for value in point])
    with _figure(axes) as (figure, plot):
        for index, (name, points) in enumerate(series.items()):
            colour, (x, y) = COLOURS[index % len(COLOURS)], list(zip(*points, strict=True)) or ((), ())
            marker = "o" if len(points) <= DOTTED_POINTS else None
            plot.plot(x, y, color=colour, label=name, marker=marker, linewidth=1.8, gid=f"line-{index}")
            if bands.get(name):
                x, low, high = zip(*bands[name], strict=True)
                plot.fill_between(x, low, high, color=colour, alpha=BAND_OPACITY, linewidth=0, gid=f"band-{index}")
        plot.legend(frameon=False)
        return _svg(figure)


def bar_chart(series: Mapping[str, Bars], axes: Axes) -> str:
    """An SVG document with a bar of each series in each group, side by side, and a whisker over its interval.

    A series may lack groups; a whisker whose ends aren't finite is left out.

    Raises:
        ValueError: there is no bar, or a height isn't finite.
    """
    _check_finite(axes, [height for bars in series.values() for height, _, _ in bars.values()], [])
    groups = list(dict.fromkeys(group for bars in series.values() for group in bars))
    width = BARS_WIDTH / len(series)
    with _figure(axes) as (figure, plot):
        for index, (name, bars) in enumerate(series.items()):
            places = [groups.index(group) + (index + 0.5) * width - BARS_WIDTH / 2 for group in bars]
            heights = [height for height, _, _ in bars.values()]
            ends = [(h - low, high - h) if math.isfinite(high - low) else (0, 0) for h, low, high in bars.values()]
            whiskers = list(zip(*ends, strict=True))
            plot.bar(places, heights, width, label=name, color=COLOURS[index % len(COLOURS)])
            plot.errorbar(places, heights, whiskers, fmt="none", ecolor="#333", capsize=3, linewidth=1)
        plot.set_xticks(range(len(groups)), [textwrap.fill(group, LABEL_CHARACTERS) for group in groups])
        if len(series) > 1:
            figure.legend(frameon=False, loc="outside lower center", ncols=len(series))
        return _svg(figure)


def points_chart(points: Mapping[str, Point], axes: Axes) -> str:
    """An SVG document with a dot of each name, and whiskers of its errors to either side; a NaN error has none.

    In the document a dot's group has the id "point-<number>".

    Raises:
        ValueError: there is no point, or a coordinate isn't finite.
    """
    _check_finite(axes, [value for point in points.values() for value in (point.x, point.y)], [])
    with _figure(axes) as (figure, plot):
        for index, (name, point) in enumerate(points.items()):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index // len(COLOURS) % len(MARKERS)]
            errors = [0.0 if math.isnan(error) else error for error in (point.x_error, point.y_error)]
            plot.errorbar(point.x, point.y, errors[1], errors[0], fmt="none", ecolor=colour, capsize=3, linewidth=1)
            plot.plot(point.x, point.y, marker, color=colour, label=name, gid=f"point-{index}")
        plot.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure)


@contextmanager
def _figure(axes: Axes) -> Iterator[tuple[Figure, Any]]:
    """A figure without a window's backend, and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, layout="constrained")
        plot = figure.add_subplot()
        plot.set_title(axes.title, fontsize=11)
        plot.set_xlabel(axes.x_label)
        plot.set_ylabel(axes.y_label)
        plot.grid(axis="y", color="#ddd", linewidth=0.8)
        plot.set_axisbelow(True)
        yield figure, plot


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _check_finite(axes: Axes, values: Sequence[float], edges: Sequence[float]) -> None:
    if not values or not all(math.isfinite(value) for value in (*values, *edges)):
        raise ValueError(f"chart {axes.title!r}: points are missing or not finite")
