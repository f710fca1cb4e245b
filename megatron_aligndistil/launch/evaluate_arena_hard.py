"""``aligndistil evaluate arena_hard`` (paper Table 1): win rates over a baseline, raw and under style control."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_aligndistil.config.evaluation_rules import models_of
from megatron_aligndistil.config.evaluation_schema import ArenaHardEvaluationConfig
from megatron_aligndistil.errors import ConfigError, DataError, reason
from megatron_aligndistil.evaluation.arena_hard import (
    FIELDS,
    MAX_TOKENS,
    ArenaPrompt,
    Game,
    Match,
    length_counter,
    play,
)
from megatron_aligndistil.evaluation.arena_results import Figures, Played, figures
from megatron_aligndistil.evaluation.benchmark import Answer, Question
from megatron_aligndistil.evaluation.benchmark_rows import Id, Row, by_id, fields, in_order, read_rows
from megatron_aligndistil.evaluation.content_cache import key_of
from megatron_aligndistil.evaluation.judge import Judge
from megatron_aligndistil.launch.evaluation_task import Evaluation, Scored
from megatron_aligndistil.report.arena_hard import report

PROMPT_KEY = "benchmark.judge_prompt"
BUILT_IN = "built-in"
IDS = ("question_id", "uid")  # v0.1's, and later files'
ANSWER_FORM = "choices[0].turns[0].content, or messages[-1].content.answer"


def prepare(config: ArenaHardEvaluationConfig) -> ArenaHard:
    """Questions, the baseline's answers and the judge's prompt, checked.

    Raises:
        ConfigError: the judge's prompt cannot be used, or a model has the baseline's name.
        DataError: a file cannot be read; a row is missing, there twice, or not of a form that is known.
    """
    own = config.benchmark
    for section, names in (("models", models_of(config)), ("outputs", config.outputs)):
        if own.baseline in names:
            raise ConfigError(f"{section}.{own.baseline}: the baseline has this name; rename it")
    prompt = judge_prompt(own.judge_prompt)
    folder = Path(own.folder).expanduser()
    rows = by_id(read_rows(folder / "question.jsonl"), *IDS)
    texts = {key: _question(row) for key, row in rows.items()}
    evaluation = ArenaHard(config, prompt, texts, {key: row.origin for key, row in rows.items()})
    path = folder / "model_answer" / f"{own.baseline}.jsonl"
    evaluation.baseline = evaluation.read_answers(f"benchmark.baseline={own.baseline}", path)
    return evaluation


def judge_prompt(path: str | None) -> ArenaPrompt:
    """Upstream's judge YAML, or the built-in prompt.

    Raises:
        ConfigError: it cannot be read, or its templates have other fields than ``FIELDS``.
    """
    if path is None:
        return ArenaPrompt()
    import yaml

    try:
        found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{PROMPT_KEY}={path}: not a YAML file ({reason(error)}); name another") from error
    known = found if isinstance(found, dict) else {}
    system, templates = known.get("system_prompt"), known.get("prompt_template")
    templates = [templates] if isinstance(templates, str) else templates
    usable = isinstance(templates, list) and templates and all(isinstance(own, str) for own in templates)
    if not isinstance(system, str) or not isinstance(templates, list) or not usable:
        raise ConfigError(f"{PROMPT_KEY}={path}: no text system_prompt and list prompt_template; write both into it")
    if {field for own in templates for field in fields(own)} != set(FIELDS):
        shown = ", ".join(f"{{{field}}}" for field in FIELDS)
        raise ConfigError(f"{PROMPT_KEY}={path}: the fields of prompt_template are not {shown}; correct it")
    return ArenaPrompt(system, tuple(templates))


class ArenaHard(Evaluation):
    """Answers to hard questions against a baseline's, in both orders."""

    max_new_tokens = 4096
    baseline: list[Answer]

    def __init__(
        self,
        config: ArenaHardEvaluationConfig,
        prompt: ArenaPrompt,
        texts: Mapping[Id, str],
        origins: Mapping[Id, str],
    ) -> None:
        self._config, self._prompt, self._texts, self._origins = config, prompt, texts, origins
        self.questions = [Question(origins[key], ({"role": "user", "content": text},)) for key, text in texts.items()]

    def read_answers(self, key: str, path: Path) -> list[Answer]:
        """Upstream's model_answer/<model>.jsonl, v0.1's or a later one; in any order, since rows have ids."""
        rows = by_id(read_rows(path, f"{key}: {path}"), *IDS)
        return [Answer((_answer(row),)) for row in in_order(path, rows, self._origins)]

    def score(self, answers: Mapping[str, Sequence[Answer]], judge: Judge | None) -> Scored:
        """Every model against the baseline, all in one pool."""
        assert judge is not None
        config, files, played = self._config, {}, {}
        baseline = [own.turns[0] for own in self.baseline]
        for name, own in answers.items():
            texts = [answer.turns[0] for answer in own]
            matches = [Match(*of) for of in zip(self._texts.values(), baseline, texts, strict=True)]
            games = play(judge, self._prompt, matches, config.judge.max_tokens or MAX_TOKENS)
            played[name] = Played(matches, games)
            files[f"judgments/{name}.jsonl"] = self._judgments(name, judge.endpoint.model, games)
            files[f"answers/{name}.jsonl"] = self._answers(name, texts)
        found = figures(config, played, length_counter())
        results = {name: self._results(found, name) for name in played}
        return Scored(report(config, found, judge.endpoint.model, len(self.questions)), results, files)

    def _results(self, found: Figures, name: str) -> dict[str, object]:
        own = found.models[name]
        result: dict[str, object] = {
            "baseline": self._config.benchmark.baseline,
            "win_rate_percent": vars(own.win_rate),
            "questions": len(self.questions),
            "games": own.games,
            "unreadable": own.unreadable,
            "skipped": own.skipped,
            "asked_again": own.asked_again,
            "battles": own.battles,
            "answer_length": {"unit": found.unit, "mean": own.length},
            "judge_prompt": {
                "from": self._config.benchmark.judge_prompt or BUILT_IN,
                "sha256": key_of({"system": self._prompt.system, "templates": list(self._prompt.templates)}),
            },
        }
        if found.pool is not None:
            result["style_controlled_win_rate_percent"] = vars(own.style_controlled)
            result["style_control"] = found.pool
        return result

    def _judgments(self, name: str, judge: str, played: Sequence[tuple[Game, Game]]) -> str:
        """As upstream's model_judgment/<judge>/<model>.jsonl, but for the judge's prompt."""
        rows = (
            {
                "question_id": key,
                "model": name,
                "judge": judge,
                "games": [{"judgment": game.said, "score": game.label} for game in games],
            }
            for key, games in zip(self._texts, played, strict=True)
        )
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _answers(self, name: str, texts: Sequence[str]) -> str:
        """As upstream's model_answer/<model>.jsonl of v0.1."""
        rows = (
            {"question_id": key, "model_id": name, "choices": [{"index": 0, "turns": [{"content": text}]}]}
            for key, text in zip(self._texts, texts, strict=True)
        )
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _question(row: Row) -> str:
    if "prompt" in row.values:
        return row.text("prompt")
    turns = row.values.get("turns")
    content = _within(turns, 0, "content")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(content, str):
        raise DataError(f"{row.origin}: neither a text 'prompt' nor one turn with a 'content'; correct the row")
    return content


def _answer(row: Row) -> str:
    for text in (
        _within(row.values, "choices", 0, "turns", 0, "content"),
        _within(row.values, "messages", -1, "content", "answer"),
    ):
        if isinstance(text, str):
            return text
    raise DataError(f"{row.origin}: no answer's text at {ANSWER_FORM}; correct the row")


def _within(value: Any, *path: str | int) -> Any:
    """What is there under keys and places; None where there isn't anything."""
    for step in path:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None
    return value
