"""The table and the chart of several models' answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_aligndistil.evaluation.answers import ModelRow
from megatron_aligndistil.evaluation.intervals import Estimate
from megatron_aligndistil.report.analysis import Cell, Report, Table, csv_cells, number, percent
from megatron_aligndistil.report.chart import Axes, bar_chart, line_chart

QUANTITIES = ("length", "reward", "reward_win_rate", "judge_win_rate")


def answers_table(rows: Sequence[ModelRow], baseline: str | None) -> Table:
    """A row a model; columns that no model has are left out."""
    columns: dict[str, list[str]] = {"model": [row.model for row in rows]}
    if any(row.reward_win_rate for row in rows):
        columns[f"win rate over {baseline} by reward"] = [percent(row.reward_win_rate) for row in rows]
        columns["ties"] = ["-" if row.ties is None else str(row.ties) for row in rows]
    if any(row.judge_win_rate for row in rows):
        columns[f"win rate over {baseline} by judge"] = [percent(row.judge_win_rate) for row in rows]
    if any(row.reward for row in rows):
        columns["mean reward"] = [number(row.reward) for row in rows]
    for name in dict.fromkeys(name for row in rows for name in row.others):
        columns[name] = [number(row.others.get(name), 4) for row in rows]
    columns["mean tokens"] = [number(row.length, 1) for row in rows]
    return Table(list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)])


def answers_records(rows: Sequence[ModelRow]) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """The CSV's columns and rows: one a model and quantity."""
    records: list[tuple[Cell, ...]] = []
    for row in rows:
        given: dict[str, Estimate | None] = {name: getattr(row, name) for name in QUANTITIES}
        given |= row.others
        records += [(row.model, name, *csv_cells(own)) for name, own in given.items() if own is not None]
        for name in ("ties", "unreadable"):
            if getattr(row, name) is not None:
                records.append((row.model, name, getattr(row, name), None, None))
    return ("model", "quantity", "value", "low", "high"), records


def win_rate_chart(rows: Sequence[ModelRow], baseline: str) -> str | None:
    """Bars of the win rates, with their intervals; None where there is none, as of a judge that can't be read."""
    series = {
        label: {
            row.model: _bar(own)
            for row in rows
            if (own := getattr(row, name)) is not None and not math.isnan(own.value)
        }
        for label, name in (("by reward", "reward_win_rate"), ("by judge", "judge_win_rate"))
    }
    drawn = {name: bars for name, bars in series.items() if bars}
    return bar_chart(drawn, Axes(f"Win rate over {baseline}", "", "share")) if drawn else None


def trade_off_chart(rows: Mapping[str, Sequence[ModelRow]], divergence: str) -> str:
    """The mean reward of each model over its divergence, one line a series of models."""
    points = {
        name: [(own.others[divergence].value, own.reward.value) for own in of if own.reward is not None]
        for name, of in rows.items()
    }
    return line_chart(points, Axes("Reward against divergence", divergence, "mean reward"))


def intervals_note(samples: int, seed: int) -> str:
    """What the intervals are."""
    return (
        f"In brackets: 95 % intervals of {samples} bootstrap samples of the prompts (seed {seed}). Win rates are in "
        "per cent, a tie counting as half; tokens include the end token."
    )


def comparison(
    name: str,
    title: str,
    rows: Sequence[ModelRow],
    baseline: str | None,
    notes: Sequence[str],
    files: Mapping[str, str],
) -> Report:
    """The report of models, compared with a baseline where there is one."""
    columns, records = answers_records(rows)
    chart = None if baseline is None else win_rate_chart(rows, baseline)
    charts = {} if chart is None else {f"{name}.svg": chart}
    return Report(name, title, [answers_table(rows, baseline)], columns, records, charts, notes, files)


def _bar(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high
