"""``aligndistil evaluate pairwise`` (paper Table 4): win rates over a baseline by judge and reward, mean rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_aligndistil.config.evaluation_schema import (
    JudgeConfig,
    PairwiseEvaluationConfig,
    RewardEvaluationConfig,
)
from megatron_aligndistil.data.records import read_records
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.evaluation.answers import Answers, ModelRow, compare
from megatron_aligndistil.evaluation.benchmark import Answer, Question
from megatron_aligndistil.evaluation.benchmark_rows import read_rows, read_text
from megatron_aligndistil.evaluation.intervals import Estimate
from megatron_aligndistil.evaluation.judge import Judge
from megatron_aligndistil.evaluation.pairwise import PROMPT, Judged, Pair, check_prompt, judge_pairs
from megatron_aligndistil.launch.analysis_answers import reward_models, scores, text_of
from megatron_aligndistil.launch.analysis_bench import Bench, Named, sampled
from megatron_aligndistil.launch.evaluation_answers import Conversation, tokenized
from megatron_aligndistil.launch.evaluation_task import Evaluation, Scored
from megatron_aligndistil.report.answers import comparison, intervals_note
from megatron_aligndistil.types import Example

MAX_TOKENS = 512  # of a judgment
PROMPT_KEY, REWARD_KEY = "benchmark.judge_prompt", "reward"
ANSWERS_FILE, JUDGMENTS = "answers.jsonl", "judgments"


def prepare(config: PairwiseEvaluationConfig) -> Comparison:
    """Any prompts."""
    return Comparison("pairwise", "Comparison of answers", config, judge_prompt(config.benchmark.judge_prompt, PROMPT))


def judge_prompt(path: str | None, built_in: str, key: str = PROMPT_KEY) -> str:
    """A judge's prompt from a text file, or ``built_in``; messages name it by ``key``.

    Raises:
        UserError: it cannot be read, or lacks a field.
    """
    if path is None:
        return built_in
    text = read_text(Path(path).expanduser(), f"{key}={path}")
    check_prompt(f"{key}={path}", text)
    return text


class Comparison(Evaluation):
    """Models' answers to the prompts of data sets, by a reward, and by a judge where there is one."""

    def __init__(
        self, name: str, title: str, config: PairwiseEvaluationConfig | RewardEvaluationConfig, prompt: str | None
    ) -> None:
        self._name, self._title, self._config, self._prompt = name, title, config, prompt
        own = config.benchmark
        records = [record for name in own.prompts for record in read_records(name, "prompt")]
        if not records:
            raise DataError(f"benchmark.prompts={own.prompts}: no rows; name data with prompts")
        kept = [records[i] for i in sampled(len(records), own.limit, config.seed)]
        self.questions = [Question(record.origin, record.prompt) for record in kept]
        self.reward_models: Sequence[Named] = _reward_models(config)
        self._rewards: Mapping[str, np.ndarray] = {}

    @property
    def _baseline(self) -> str | None:
        return self._config.benchmark.baseline if isinstance(self._config, PairwiseEvaluationConfig) else None

    def read_answers(self, key: str, path: Path) -> list[Answer]:
        """JSON lines {"prompt": …, "answer": …}."""
        return read_ready(key, path, [text_of(question.prompt) for question in self.questions])

    def measure(
        self, bench: Bench, drawn: Mapping[str, Sequence[Conversation]], ready: Mapping[str, Sequence[Answer]]
    ) -> None:
        """The rewards of all answers."""
        if self._config.reward.source is None:
            return
        examples: dict[str, Sequence[Example]] = {
            name: [_example(own, i) for i, own in enumerate(of)] for name, of in drawn.items()
        }
        for name, answers in ready.items():
            examples[name] = tokenized(bench, self.questions, [answer.turns[0] for answer in answers])
        self._rewards = scores(bench, self._config.reward, examples, REWARD_KEY)

    def score(self, answers: Mapping[str, Sequence[Answer]], judge: Judge | None) -> Scored:
        """Every model's answers against the baseline's."""
        judged = {} if judge is None else self._judged(answers, judge)
        figures = {name: Answers(_lengths(of), self._rewards.get(name)) for name, of in answers.items()}
        verdicts = {name: own.verdicts for name, own in judged.items()}
        config, baseline = self._config, self._baseline
        rows = compare(figures, baseline, verdicts, config.bootstrap_samples, config.seed)
        notes = [
            f"{len(self.questions)} prompts.",
            *_reward_note(config),
            *_judge_note(config.judge, judged),
            intervals_note(config.bootstrap_samples, config.seed),
        ]
        report = comparison(self._name, self._title, rows, baseline, notes, {})
        files = {f"{JUDGMENTS}/{name}.jsonl": self._judgments(own) for name, own in judged.items()}
        files[ANSWERS_FILE] = self._answers(answers)
        return Scored(report, {row.model: _figures(row) for row in rows}, files)

    def _judged(self, answers: Mapping[str, Sequence[Answer]], judge: Judge) -> dict[str, Judged]:
        assert self._prompt is not None and self._baseline is not None
        baseline, found = answers[self._baseline], {}
        for name, own in answers.items():
            if name != self._baseline:
                pairs = [
                    Pair(text_of(question.prompt), answer.turns[0], base.turns[0])
                    for question, answer, base in zip(self.questions, own, baseline, strict=True)
                ]
                found[name] = judge_pairs(judge, self._prompt, pairs, self._config.judge.max_tokens or MAX_TOKENS)
        return found

    def _answers(self, answers: Mapping[str, Sequence[Answer]]) -> str:
        """A line a prompt: every model's answer, its tokens, whether it ended, its reward."""
        lines = []
        for i, question in enumerate(self.questions):
            row: dict[str, dict[str, object]] = {}
            for name, own in answers.items():
                row[name] = {"text": own[i].turns[0], "tokens": own[i].tokens, "ended": own[i].ended}
                if name in self._rewards:
                    row[name]["reward"] = float(self._rewards[name][i])
            lines.append(json.dumps({"prompt": text_of(question.prompt), "answers": row}, ensure_ascii=False) + "\n")
        return "".join(lines)

    def _judgments(self, judged: Judged) -> str:
        """A line a prompt: what the judge said, the model's answer shown first and second, and for whom."""
        rows = zip(self.questions, judged.texts, judged.first, judged.second, strict=True)
        return "".join(
            json.dumps({"row": question.origin, "said": said, "for_model": [first, second]}, ensure_ascii=False) + "\n"
            for question, said, first, second in rows
        )


def _reward_models(config: PairwiseEvaluationConfig | RewardEvaluationConfig) -> list[Named]:
    return reward_models(config.reward, config.reward.initial_path or "", REWARD_KEY)


def _example(conversation: Conversation, place: int) -> Example:
    assert conversation.sequence is not None
    return Example(str(place), (conversation.sequence,))


def _lengths(answers: Sequence[Answer]) -> np.ndarray:
    """Tokens, NaN where they aren't known."""
    return np.array([np.nan if own.tokens is None else own.tokens for own in answers], np.float64)


def _figures(row: ModelRow) -> dict[str, object]:
    """What the table has, for programs."""
    given: dict[str, Estimate | None] = {
        "judge_win_rate": row.judge_win_rate,
        "reward_win_rate": row.reward_win_rate,
        "reward": row.reward,
        "answer_tokens": row.length,
    }
    found: dict[str, object] = {name: vars(own) for name, own in given.items() if own is not None}
    return found | {name: value for name in ("ties", "unreadable") if (value := getattr(row, name)) is not None}


def _reward_note(config: PairwiseEvaluationConfig | RewardEvaluationConfig) -> list[str]:
    reward = config.reward
    if reward.source is None:
        return []
    return [f"Reward: {reward.source}{f', {reward.path}' if reward.path else ''}."]


def _judge_note(settings: JudgeConfig, judged: Mapping[str, Judged]) -> list[str]:
    if not judged:
        return []
    unreadable = ", ".join(f"{name} {own.verdicts.unreadable}" for name, own in judged.items())
    return [
        f"Judge: {settings.model}, temperature 0, each pair in both orders. Verdicts that could not be read, of two a "
        f"prompt, and so count for nobody: {unreadable}."
    ]


def read_ready(key: str, path: Path, prompts: Sequence[str]) -> list[Answer]:
    """Ready answers: JSON lines {"prompt": …, "answer": …} in the order of ``prompts``.

    Raises:
        DataError: a line is no such row, or is missing, or another prompt's.
    """
    found = []
    for place, row in enumerate(read_rows(path, f"{key}={path}"), 1):
        prompt, answer = row.text("prompt"), row.text("answer")
        if place > len(prompts) or prompt != prompts[place - 1]:
            raise DataError(
                f"{row.origin}: its prompt is not place {place} of benchmark.prompts (limit and seed included); give "
                "the answers in the prompts' order"
            )
        found.append(Answer((answer,)))
    if len(found) < len(prompts):
        raise DataError(f"{path}: {len(found)} rows, {len(prompts)} prompts; add the answers that are missing")
    return found
