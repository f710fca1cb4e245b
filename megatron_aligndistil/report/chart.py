"""A line chart as SVG, written by hand so that it needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
Band = Sequence[tuple[float, float, float]]  # x, lower edge, upper edge

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 44, 48
TICKS = 5
BAND_OPACITY = 0.18
COLOURS = ("#1f6feb", "#d1495b", "#2e933c", "#8a5cf6", "#b8860b")


@dataclass(frozen=True)
class Axes:
    """What the chart says around its lines."""

    title: str
    x_label: str
    y_label: str


@dataclass(frozen=True)
class _Scale:
    """Data coordinates to pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def line_chart(series: Mapping[str, Points], axes: Axes, bands: Mapping[str, Band] | None = None) -> str:
    """An SVG document with one line a series, and a shaded band in its colour around each that ``bands`` has.

    Raises:
        ValueError: there is no point, one isn't finite, or a band belongs to no series.
    """
    bands = bands or {}
    if stray := sorted(bands.keys() - series.keys()):
        raise ValueError(f"chart {axes.title!r}: bands without a line: {', '.join(stray)}")
    points = [point for line in series.values() for point in line]
    points += [(x, edge) for band in bands.values() for x, *edges in band for edge in edges]
    if not any(series.values()) or not all(math.isfinite(value) for point in points for value in point):
        raise ValueError(f"chart {axes.title!r}: points are missing or not finite")
    scale = _Scale(*_range([x for x, _ in points]), *_range([y for _, y in points]))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 20, axes.title, size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, axes.x_label),
        f'<g transform="rotate(-90 14 {HEIGHT / 2})">{_text(14, HEIGHT / 2, axes.y_label)}</g>',
        *_grid(scale),
        *_bands(series, bands, scale),
        *_lines(series, scale),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.5 * max(abs(low), 1.0) if low == high else 0.0
    return low - margin, high + margin


def _grid(scale: _Scale) -> Iterator[str]:
    for i in range(TICKS):
        share = i / (TICKS - 1)
        y_value = scale.y_low + share * (scale.y_high - scale.y_low)
        x_value = scale.x_low + share * (scale.x_high - scale.x_low)
        y = scale.y(y_value)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(LEFT - 6, y + 4, f"{y_value:.3g}", anchor="end")
        yield _text(scale.x(x_value), HEIGHT - BOTTOM + 16, f"{x_value:.3g}")


def _bands(series: Mapping[str, Points], bands: Mapping[str, Band], scale: _Scale) -> Iterator[str]:
    """Polygons along the upper edge and back along the lower one; drawn before the lines, which stay visible."""
    for index, name in enumerate(series):
        band = bands.get(name, ())
        if not band:
            continue
        edges = [*((x, high) for x, _, high in band), *((x, low) for x, low, _ in reversed(band))]
        outline = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in edges)
        colour = COLOURS[index % len(COLOURS)]
        yield f'<polygon points="{outline}" fill="{colour}" fill-opacity="{BAND_OPACITY}" stroke="none"/>'


def _lines(series: Mapping[str, Points], scale: _Scale) -> Iterator[str]:
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield _text(LEFT + 8, TOP + 4 + 15 * index, name, anchor="start", colour=colour)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12, colour: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
