"""Arena-Hard's table."""

from __future__ import annotations

from megatron_aligndistil.config.evaluation_schema import ArenaHardEvaluationConfig
from megatron_aligndistil.evaluation.arena_hard import MAX_TOKENS
from megatron_aligndistil.evaluation.arena_results import Figures
from megatron_aligndistil.report.analysis import Report, Table, csv_cells, number

NAME = "arena_hard"
OFFICIAL_QUESTIONS = 500


def report(config: ArenaHardEvaluationConfig, found: Figures, judge: str, questions: int) -> Report:
    """A row a model. Style-controlled figures stand with the id of their pool."""
    controlled = found.pool is not None
    header = ["model", "win rate, %", *(["style-controlled, %"] if controlled else []), found.unit, "unreadable"]
    rows, records = [], []
    pool = "" if found.pool is None else str(found.pool["pool"])
    for name, own in found.models.items():
        style = [number(own.style_controlled, 1)] if controlled else []
        rows.append([name, number(own.win_rate, 1), *style, f"{own.length:.0f}", f"{own.unreadable}/{own.games}"])
        counts = (own.games, own.unreadable, own.skipped, own.asked_again, own.battles, own.length, found.unit, pool)
        records.append((name, *csv_cells(own.win_rate), *csv_cells(own.style_controlled), *counts))
    return Report(
        name=NAME,
        title="Arena-Hard",
        tables=[Table(header, rows)],
        columns=[
            *("model", "win_rate_percent", "win_rate_low", "win_rate_high"),
            *("style_controlled_win_rate_percent", "style_controlled_low", "style_controlled_high"),
            *("games", "unreadable", "skipped", "asked_again", "battles", "answer_length", "length_unit", "pool"),
        ],
        records=records,
        notes=_notes(config, found, judge, questions),
    )


def _notes(config: ArenaHardEvaluationConfig, found: Figures, judge: str, questions: int) -> list[str]:
    own = config.benchmark
    subset = "" if questions == OFFICIAL_QUESTIONS else f" The benchmark has {OFFICIAL_QUESTIONS}: not its figures."
    again = ", ".join(f"{name} {of.asked_again} and {of.skipped}" for name, of in found.models.items())
    notes = [
        f"{questions} questions against {own.baseline}, each in both orders; a tie is half a win, a strong verdict "
        f"counts {own.strong_weight} times.{subset} Judge: {judge}, temperature 0, at most "
        f"{config.judge.max_tokens or MAX_TOKENS} tokens, prompt: {own.judge_prompt or 'built-in'}. Games without a "
        f"readable verdict count for nobody; asked again for a label, and skipped: {again}. In brackets: 95 % "
        f"intervals, {config.bootstrap_samples} bootstrap samples of questions, seed {config.seed}."
    ]
    if found.pool is not None:
        notes.append(
            f"Style-controlled figures compare only inside their pool ({', '.join(found.models)}, against "
            f"{own.baseline}; id {str(found.pool['pool'])[:12]}), whose battles centre the features: length in "
            f"{found.unit}, headers, lists, bold."
        )
    return notes
