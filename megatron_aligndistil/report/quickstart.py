"""The quickstart's results: ``summary.json`` for programs, ``report.md`` for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_aligndistil.report.table import markdown_table

SUMMARY_FILE, REPORT_FILE = "summary.json", "report.md"


@dataclass(frozen=True)
class ModelRow:
    """One model of the table. ``heldout_reward`` is a token's, ``kl_to_initial`` in nats a token."""

    model: str
    heldout_reward: float
    property_rate: float
    kl_to_initial: float
    seconds: float | None = None  # of the training that made it


@dataclass(frozen=True)
class Example:
    """A held-out question and the answer of each model, in the table's order."""

    question: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class CrossCheck:
    """A figure as the trainer has logged it, beside the one computed from the exported model."""

    model: str
    metric: str
    logged: float
    dense: float


@dataclass(frozen=True)
class Stage:
    """A part of the quickstart: how long it took, and the command that does it again."""

    title: str
    seconds: float
    command: str = ""


@dataclass(frozen=True)
class QuickstartResult:
    """Everything that the report says."""

    model: str
    property_rule: str
    heldout: str
    rows: Sequence[ModelRow]
    examples: Sequence[Example]
    cross_checks: Sequence[CrossCheck]
    stages: Sequence[Stage]
    seconds: float
    notes: Sequence[str] = field(default_factory=tuple)
    charts: Mapping[str, str] = field(default_factory=dict)  # title → file beside the report


def summary(rows: Sequence[ModelRow], seconds: float) -> dict[str, object]:
    """What ``summary.json`` holds.

    Raises:
        ValueError: a figure isn't finite.
    """
    listed = []
    for row in rows:
        figures = {name: getattr(row, name) for name in ("heldout_reward", "property_rate", "kl_to_initial")}
        if not all(math.isfinite(value) for value in figures.values()):
            raise ValueError(f"{row.model}: a figure isn't finite: {figures}")
        listed.append({"model": row.model, **figures})
    return {"rows": listed, "seconds": round(seconds, 1)}


def results_table(rows: Sequence[ModelRow]) -> str:
    """The table of models, as Markdown."""
    return markdown_table(
        ("model", "held-out reward a token", "property's rate", "KL to initial", "seconds of training"),
        [
            (
                row.model,
                f"{row.heldout_reward:.4f}",
                f"{row.property_rate:.0%}",
                f"{row.kl_to_initial:.4f}",
                "-" if row.seconds is None else f"{row.seconds:.0f}",
            )
            for row in rows
        ],
    )


def examples_text(examples: Sequence[Example]) -> str:
    """Questions and answers as a Markdown list."""
    blocks = []
    for example in examples:
        lines = [f"- **{_flat(example.question)}**"]
        lines += [f"  - *{model}:* {_flat(answer)}" for model, answer in example.answers.items()]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def report(result: QuickstartResult) -> str:
    """The whole report as Markdown."""
    sections = [
        f"# Quickstart: {result.model} aligned by AlignDistil",
        results_table(result.rows),
        "\n".join(
            [
                "- Held-out reward: β₀ E_{v~π_θ}[log π_d(v) - log π_r(v)] of the DPO and the reverse DPO model, "
                f"a mean over the response tokens of {result.heldout}.",
                f"- The property's rate: the share of greedy answers to those prompts in which {result.property_rule}.",
                "- KL to initial: KL(π_θ ‖ π_initial) in nats, a mean over the same tokens.",
                *(f"- {note}" for note in result.notes),
            ]
        ),
        "## Answers before and after",
        examples_text(result.examples),
    ]
    if result.cross_checks:
        sections += [
            "## The trainer's own figures",
            "The table comes from the exported models, evaluated with transformers in float32. "
            "The trainer's validation, on Megatron-Core in the precision of training, says:",
            _cross_check_table(result.cross_checks),
        ]
    if result.charts:
        sections += ["## Training", *(f"![{title}]({file})" for title, file in result.charts.items())]
    sections += ["## Stages", _stages(result.stages), f"All in all {result.seconds:.0f} s."]
    return "\n\n".join(sections) + "\n"


def write(result: QuickstartResult, folder: Path) -> None:
    """Write ``summary.json`` and ``report.md`` to ``folder``."""
    _write(folder / REPORT_FILE, report(result))
    _write(folder / SUMMARY_FILE, json.dumps(summary(result.rows, result.seconds), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _cross_check_table(checks: Sequence[CrossCheck]) -> str:
    rows = [(check.model, check.metric, f"{check.logged:.4f}", f"{check.dense:.4f}") for check in checks]
    return markdown_table(("model", "metric", "trainer", "exported model"), rows)


def _stages(stages: Sequence[Stage]) -> str:
    lines = []
    for stage in stages:
        lines.append(f"- {stage.title}: {stage.seconds:.0f} s")
        if stage.command:
            lines.append(f"\n  ```sh\n  {stage.command}\n  ```")
    return "\n".join(lines)


def _flat(text: str) -> str:
    return " ".join(text.split())
