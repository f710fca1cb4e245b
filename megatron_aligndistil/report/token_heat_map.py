"""Responses as HTML whose tokens are coloured by a figure: one page without scripts or other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

POSITIVE, NEGATIVE = (31, 111, 235), (209, 73, 91)
STYLE = (
    "body{font:15px/1.9 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    ".prompt{color:#666;white-space:pre-wrap;font-size:13px;line-height:1.4}"
    ".response{white-space:pre-wrap}.response span{border-radius:3px;padding:1px 0}"
)


@dataclass(frozen=True)
class ShownResponse:
    """A response's tokens as texts, and their figures [T] by name."""

    origin: str
    prompt: str
    tokens: Sequence[str]
    figures: Mapping[str, np.ndarray]


def heat_map(responses: Sequence[ShownResponse], colour: str, titles: Mapping[str, str]) -> str:
    """The page; pointing at a token shows all its figures.

    The colours' strength is the figure named ``colour`` over its largest magnitude on the page, blue where it is
    positive and red where it is negative.
    """
    largest = max((float(np.abs(own.figures[colour]).max(initial=0.0)) for own in responses), default=0.0)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Response tokens</title><style>{STYLE}'
        "</style></head><body>",
        f"<h1>Response tokens by {escape(titles[colour])}</h1><p>Full colour: {largest:.4g}; blue positive, red "
        "negative. Point at a token for its figures.</p>",
    ]
    for own in responses:
        spans = "".join(_span(own, i, largest, colour, titles) for i in range(len(own.tokens)))
        parts.append(
            f'<h2>{escape(own.origin)}</h2><div class="prompt">{escape(own.prompt)}</div>'
            f'<div class="response">{spans}</div>'
        )
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _span(own: ShownResponse, i: int, largest: float, colour: str, titles: Mapping[str, str]) -> str:
    value = float(own.figures[colour][i])
    red, green, blue = POSITIVE if value >= 0 else NEGATIVE
    share = abs(value) / largest if largest else 0.0
    figures = "; ".join(f"{titles[name]} {values[i]:.4g}" for name, values in own.figures.items())
    token = own.tokens[i]
    text = token.replace("\n", "↵\n") if token.strip(" ") else token.replace(" ", "\u00a0") or "∅"
    background = f"rgba({red},{green},{blue},{share:.3f})"
    return f'<span style="background:{background}" title="{escape(figures)}">{escape(text)}</span>'
