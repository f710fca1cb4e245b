"""``aligndistil analyze compare`` (paper Table 4): several models' answers, by a reward and by a judge."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_aligndistil.config.analysis_schema import CompareAnalysisConfig, JudgeConfig
from megatron_aligndistil.evaluation.answers import ModelRow, Verdicts, compare
from megatron_aligndistil.evaluation.judge import PROMPT, Judge, Question
from megatron_aligndistil.launch.analysis_answers import (
    Asked,
    Drawn,
    answers_of,
    draw,
    reward_models,
    sampling_note,
    scores,
)
from megatron_aligndistil.launch.analysis_bench import Bench, Named
from megatron_aligndistil.report.analysis import Report
from megatron_aligndistil.report.answers import comparison, intervals_note

NAME, ANSWERS_FILE = "compare", "answers.jsonl"


@dataclass(frozen=True)
class Measured:
    """The prompts' texts, and each model's answers and rewards."""

    prompts: Sequence[str]
    drawn: Mapping[str, Drawn]
    scored: Mapping[str, np.ndarray]


def models_of(config: CompareAnalysisConfig) -> list[Named]:
    """The models that answer, the baseline first, and the reward's."""
    baseline = config.analysis.baseline
    names = [baseline, *(name for name in config.models if name != baseline)]
    found = [Named(f"models.{name}", config.models[name]) for name in names]
    return found + reward_models(config.analysis.reward, config.models[baseline])


def measure(config: CompareAnalysisConfig, bench: Bench) -> Measured:
    """Answers and rewards, on every rank."""
    settings, output = config.analysis, Path(config.output).expanduser()
    asked = Asked.of(bench, settings.prompts, settings.limit, settings.seed)
    drawn = {
        name: draw(bench, Named(f"models.{name}", path), asked.examples, settings.sampling, output / "engines" / name)
        for name, path in config.models.items()
    }
    return Measured(asked.texts, drawn, scores(bench, settings.reward, drawn))


def report(config: CompareAnalysisConfig, measured: Measured) -> Report:
    """The table of what was measured, and of what the judge says, who is asked now."""
    settings = config.analysis
    verdicts, said = _judged(config, measured)
    rows = compare(
        answers_of(measured.drawn, measured.scored),
        settings.baseline,
        verdicts,
        settings.bootstrap_samples,
        settings.seed,
    )
    notes = [
        sampling_note(settings.sampling, len(measured.prompts), config.model.seed),
        intervals_note(settings.bootstrap_samples, settings.seed),
        *_judges_note(settings.judge, rows),
    ]
    texts = _answers_file(measured, said)
    return comparison(NAME, "Comparison of answers", rows, settings.baseline, notes, {ANSWERS_FILE: texts})


def _judged(
    config: CompareAnalysisConfig, measured: Measured
) -> tuple[dict[str, Verdicts], dict[str, list[tuple[str, str]]]]:
    """Each model's verdicts against the baseline, and the judge's texts."""
    settings, baseline = config.analysis.judge, config.analysis.baseline
    verdicts: dict[str, Verdicts] = {}
    said: dict[str, list[tuple[str, str]]] = {}
    if settings.base_url is None:
        return verdicts, said
    judge = _judge(settings)
    for name, own in measured.drawn.items():
        if name != baseline:
            texts = zip(measured.prompts, own.texts, measured.drawn[baseline].texts, strict=True)
            verdicts[name], said[name] = judge.verdicts([Question(*three) for three in texts])
    return verdicts, said


def _judge(settings: JudgeConfig) -> Judge:
    prompt = PROMPT if settings.prompt is None else Path(settings.prompt).expanduser().read_text(encoding="utf-8")
    return Judge(
        base_url=settings.base_url or "",
        model=settings.model or "",
        prompt=prompt,
        api_key=None if settings.api_key_variable is None else os.environ[settings.api_key_variable],
        max_tokens=settings.max_tokens,
        timeout_seconds=settings.timeout_seconds,
        attempts=settings.attempts,
        concurrency=settings.concurrency,
    )


def _judges_note(settings: JudgeConfig, rows: Sequence[ModelRow]) -> list[str]:
    if settings.base_url is None:
        return []
    unreadable = ", ".join(f"{row.model} {row.unreadable}" for row in rows if row.unreadable is not None)
    return [
        f"Judge: {settings.model} at {settings.base_url}, temperature 0, each pair in both orders. Verdicts that could "
        f"not be read, and so count for nobody: {unreadable}."
    ]


def _answers_file(measured: Measured, said: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """A line a prompt: every model's answer, its tokens, why it ended, its reward and the judge's two texts."""
    lines = []
    for i, prompt in enumerate(measured.prompts):
        answers = {}
        for name, own in measured.drawn.items():
            answer: dict[str, object] = {
                "text": own.texts[i],
                "tokens": len(own.samples[i].tokens),
                "finish_reason": own.samples[i].finish_reason,
            }
            if name in measured.scored:
                answer["reward"] = float(measured.scored[name][i])
            if name in said:
                answer["judge"] = said[name][i]
            answers[name] = answer
        lines.append(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False) + "\n")
    return "".join(lines)
