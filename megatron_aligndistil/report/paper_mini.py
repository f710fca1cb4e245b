"""The miniature's table: every method's figures over seeds, beside what the paper publishes for it (Table 4)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.report.chart import Axes, Point, points_chart
from megatron_aligndistil.report.convergence import mean_and_error
from megatron_aligndistil.report.table import markdown_table

MARKDOWN_FILE, CSV_FILE, JSON_FILE, SVG_FILE = (f"paper_mini.{kind}" for kind in ("md", "csv", "json", "svg"))
CLEAR_ERRORS = 2.0  # standard errors beyond which a difference counts as one


@dataclass(frozen=True)
class Figures:
    """One model, measured on its sampled answers to held-out questions.

    true_reward    mean grade of the answers
    win_rate       over the SFT model's answers by the true reward, in [0, 1]; a tie counts half
    model_reward   mean score of the seed's reward model; its zero is arbitrary
    kl_to_sft      KL(π ‖ π_SFT), nats a token of the answers
    length         tokens an answer, the end token included
    warm           share of answers that open warmly
    tips           different tips of the asked topic an answer
    polite         share of answers that end politely
    others         sentences an answer that cost
    ended          share of answers that ended in the room they had
    agreement      how often the reward model sides with the true reward, of two of the model's answers to a question
    seconds        of CPU time of its training, start and export included
    seconds_before of CPU time of the trainings whose models it takes beside SFT's
    """

    true_reward: float
    win_rate: float
    model_reward: float
    kl_to_sft: float
    length: float
    warm: float
    tips: float
    polite: float
    others: float
    ended: float
    agreement: float
    seconds: float
    seconds_before: float


@dataclass(frozen=True)
class Published:
    """The paper's Table 4 (TL;DR): win rate over SFT in [0, 1] by a judge, and mean score of the reward model."""

    win_rate: float
    reward: float


TABLE_4: Mapping[str, Published] = {
    "sft": Published(0.5, 0.55),
    "dpo": Published(0.857, 1.67),
    "ppo": Published(0.877, 2.22),
    "rto": Published(0.908, 1.98),
    "aligndistil": Published(0.928, 2.28),
    "aligndistil_on_policy": Published(0.925, 2.46),
}


@dataclass(frozen=True)
class Results:
    """``figures`` maps methods, "sft" among them, to their figures by seed; ``titles`` says what they are called."""

    titles: Mapping[str, str]
    figures: Mapping[str, Mapping[int, Figures]]
    notes: Sequence[str]
    settings: Mapping[str, object]

    def values(self, method: str, figure: str) -> list[float]:
        """A figure of every seed. "reward_gain" is the reward model's mean score less the SFT model's."""
        if figure != "reward_gain":
            return [getattr(found, figure) for found in self.figures[method].values()]
        return [
            found.model_reward - self.figures["sft"][seed].model_reward for seed, found in self.figures[method].items()
        ]


def table(results: Results) -> str:
    """The table as Markdown: means ± standard errors over seeds."""
    header = (
        "method",
        "true reward",
        "win rate, %",
        "reward model",
        "KL to SFT",
        "tokens",
        "CPU seconds",
        "and before",
    )
    rows = []
    for method, title in results.titles.items():

        def cell(figure: str, digits: int, scale: float = 1.0, method: str = method) -> str:
            return _plus_minus(results.values(method, figure), digits, scale)

        published = TABLE_4.get(method)
        rows.append(
            (
                title,
                cell("true_reward", 2),
                cell("win_rate", 1, 100),
                cell("reward_gain", 2),
                cell("kl_to_sft", 3),
                cell("length", 1),
                cell("seconds", 0),
                cell("seconds_before", 0),
                "" if published is None else f"{published.win_rate:.1%}".rstrip("%"),
                "" if published is None else f"{published.reward - TABLE_4['sft'].reward:.2f}",
            )
        )
    return markdown_table((*header, "paper: win rate, %", "paper: reward"), rows)


def answers_table(results: Results) -> str:
    """What the answers are made of, as Markdown: means ± standard errors over seeds."""
    header = ("method", "warm, %", "tips", "polite, %", "costly sentences", "ended, %", "reward model agrees, %")
    # Figure, digits, scale.
    columns = (
        *(("warm", 0, 100), ("tips", 2, 1), ("polite", 0, 100), ("others", 2, 1), ("ended", 0, 100)),
        ("agreement", 0, 100),
    )
    rows = [
        (title, *(_plus_minus(results.values(method, figure), digits, scale) for figure, digits, scale in columns))
        for method, title in results.titles.items()
    ]
    return markdown_table(header, rows)


def orders(results: Results) -> str:
    """Where the methods of Table 4 come in another order here, as sentences, by win rate and by reward."""
    return "\n".join(
        (
            "- Win rate: " + _order(results, "win_rate", lambda published: published.win_rate, 100, " points"),
            "- Reward model: " + _order(results, "reward_gain", lambda published: published.reward, 1),
        )
    )


def report(results: Results) -> str:
    """The whole report as Markdown."""
    seeds = ", ".join(map(str, results.figures["sft"]))
    return "\n\n".join(
        (
            f"# The paper in miniature: seeds {seeds}",
            table(results),
            "Means ± standard errors over seeds. Reward model: the mean score less the SFT model's under the same "
            "seed; the paper's column, from Table 4 (TL;DR), likewise. KL in nats a token of the method's own answers. "
            "CPU seconds: of its own training, and before it of the models that it takes beside SFT's.",
            "\n".join(f"- {note}" for note in results.notes),
            "## What the answers are made of",
            answers_table(results),
            "Tips: different ones of the asked topic. Costly: the sentences that lower the true reward. Ended: by "
            "itself, in the room that an answer has. Reward model agrees: of two of the method's answers to a question "
            "with different true rewards, it scores the better one higher.",
            "## Where the order differs from the paper's",
            orders(results),
            f"![True reward against KL]({SVG_FILE})",
        )
    )


def chart(results: Results) -> str:
    """True reward against KL to SFT as SVG, a point with standard errors for each method."""
    points = {}
    for method, title in results.titles.items():
        (x, x_error), (y, y_error) = (mean_and_error(results.values(method, f)) for f in ("kl_to_sft", "true_reward"))
        points[title] = Point(x, y, x_error, y_error)
    seeds = len(results.figures["sft"])
    title = f"Means ± standard errors of {seeds} seeds" if seeds > 1 else "One seed"
    return points_chart(points, Axes(title, "KL to SFT, nats a token", "true reward"))


def table_csv(results: Results) -> str:
    """The figures of every method and seed."""
    text = io.StringIO()
    names = [field.name for field in fields(Figures)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("method", "seed", *names))
    for method, by_seed in results.figures.items():
        writer.writerows((method, seed, *asdict(found).values()) for seed, found in by_seed.items())
    return text.getvalue()


def summary(results: Results) -> dict[str, object]:
    """What the JSON file holds: settings, and of each method means, standard errors, its seeds, the paper's figures.

    What there is no figure of, such as the standard error of one seed, is None.
    """
    methods = {}
    for method, by_seed in results.figures.items():
        published = TABLE_4.get(method)
        means = {}
        for name in (*(field.name for field in fields(Figures)), "reward_gain"):
            mean, error = mean_and_error(results.values(method, name))
            means[name] = {"mean": _number(mean), "standard_error": _number(error)}
        methods[method] = {
            "title": results.titles[method],
            "means": means,
            "seeds": {
                str(seed): {name: _number(value) for name, value in asdict(found).items()}
                for seed, found in by_seed.items()
            },
            "paper_table_4": None if published is None else asdict(published),
        }
    return {"settings": dict(results.settings), "methods": methods}


def write(results: Results, folder: Path) -> None:
    """Write the four files to ``folder``."""
    write_text(folder / SVG_FILE, chart(results))
    write_text(folder / CSV_FILE, table_csv(results))
    write_text(folder / JSON_FILE, json.dumps(summary(results), indent=2, allow_nan=False) + "\n")
    write_text(folder / MARKDOWN_FILE, report(results) + "\n")


def _order(results: Results, figure: str, of: Callable[[Published], float], scale: float, unit: str = "") -> str:
    known = [method for method in results.titles if method in TABLE_4]
    differing, count = [], 0
    for one, other in combinations(known, 2):
        low, high = sorted((one, other), key=lambda method: of(TABLE_4[method]))
        pairs = zip(results.values(low, figure), results.values(high, figure), strict=True)
        gain, error = mean_and_error([scale * (above - below) for below, above in pairs])
        count += 1
        if gain >= 0:
            continue
        clear = "" if math.isnan(error) else f" ± {error:.2f}"
        verdict = "" if abs(gain) > CLEAR_ERRORS * error else ", within two standard errors"
        verdict = ", one seed" if math.isnan(error) else verdict
        differing.append(f"{results.titles[low]} is above {results.titles[high]} by {-gain:.2f}{clear}{unit}{verdict}")
    if not count:
        return "no two of its methods were trained."
    if not differing:
        return f"in none of {count} pairs of its methods."
    return f"in {len(differing)} of {count} pairs of its methods: {'; '.join(differing)}."


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plus_minus(values: Sequence[float], digits: int, scale: float) -> str:
    mean, error = mean_and_error([scale * value for value in values])
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
