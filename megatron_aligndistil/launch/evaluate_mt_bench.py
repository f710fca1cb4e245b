"""``aligndistil evaluate mt_bench`` (paper Table 1): a judge's ratings from 1 to 10 of both turns of 80 questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_aligndistil.config.evaluation_schema import MTBenchConfig, MTBenchEvaluationConfig
from megatron_aligndistil.errors import DataError, reason
from megatron_aligndistil.evaluation.benchmark import Answer, Question
from megatron_aligndistil.evaluation.benchmark_rows import Row, by_id, fields, in_order, read_rows
from megatron_aligndistil.evaluation.judge import Judge
from megatron_aligndistil.evaluation.mt_bench import (
    MAX_TOKENS,
    OTHER_TEMPERATURE,
    PROMPTS,
    TEMPERATURES,
    TURNS,
    WITH_REFERENCE,
    Grade,
    JudgePrompt,
    Scores,
    TwoTurns,
    grade,
    needed_fields,
    scores,
)
from megatron_aligndistil.launch.evaluation_task import Evaluation, Scored
from megatron_aligndistil.report.analysis import Report, Table, csv_cells, number

NAME = "mt_bench"
SPACE = "lmsys/mt-bench"  # on the hub
OFFICIAL_QUESTIONS = 80
NO_RATING = -1  # in FastChat's files
QUESTION, PROMPT_FILE = "question.jsonl", "judge_prompts.jsonl"
REMEDY = f"give benchmark.folder with {QUESTION}, {PROMPT_FILE} and reference_answer/<benchmark.reference>.jsonl"


def prepare(config: MTBenchEvaluationConfig) -> MTBench:
    """The questions, the judge's prompts and the reference answers, checked.

    Raises:
        DataError: a file cannot be had or read; a row is there twice, or lacks a field; a reference answer is missing.
    """
    questions, prompts, references = _files(config.benchmark)
    rows = by_id(read_rows(questions), "question_id")
    answers = by_id(read_rows(references), "question_id")
    found = []
    for own, row in rows.items():
        category, turns = row.text("category"), _two(row, row.values.get("turns"), "turns")
        reference = None
        if category in WITH_REFERENCE:
            if own not in answers:
                raise DataError(
                    f"{references}: no row with question {own}, whose category {category} is judged by a reference "
                    f"answer ({row.origin}); add it"
                )
            reference = _choice(answers[own])
        found.append(TwoTurns(own, category, turns, reference))
    return MTBench(config, found, [row.origin for row in rows.values()], _prompts(prompts))


class MTBench(Evaluation):
    """Two-turn answers, each turn rated by itself."""

    max_new_tokens = 1024

    def __init__(
        self,
        config: MTBenchEvaluationConfig,
        asked: Sequence[TwoTurns],
        origins: Sequence[str],
        prompts: Mapping[str, JudgePrompt],
    ) -> None:
        self._config, self._asked, self._prompts = config, asked, prompts
        self.questions = [
            Question(
                origin,
                ({"role": "user", "content": own.turns[0]},),
                own.turns[1:],
                TEMPERATURES.get(own.category, OTHER_TEMPERATURE),
            )
            for own, origin in zip(asked, origins, strict=True)
        ]

    def read_answers(self, key: str, path: Path) -> list[Answer]:
        """FastChat's model_answer/<model>.jsonl, in any order, since rows have their question's id."""
        rows = by_id(read_rows(path, f"{key}={path}"), "question_id")
        wanted = {own.id: question.origin for own, question in zip(self._asked, self.questions, strict=True)}
        return [Answer(_choice(row)) for row in in_order(path, rows, wanted)]

    def score(self, answers: Mapping[str, Sequence[Answer]], judge: Judge | None) -> Scored:
        """Every model's ratings."""
        assert judge is not None
        config, found, files = self._config, {}, {}
        for name, own in answers.items():
            turns = [_turns(answer) for answer in own]
            grades = grade(judge, self._prompts, self._asked, turns, config.judge.max_tokens or MAX_TOKENS)
            found[name] = scores(self._asked, grades, config.bootstrap_samples, config.seed)
            files[f"judgments/{name}.jsonl"] = self._judgments(name, judge.endpoint.model, grades)
            files[f"answers/{name}.jsonl"] = self._answers(name, turns)
        results = {name: _results(own, len(self._asked)) for name, own in found.items()}
        return Scored(self._report(found, judge.endpoint.model), results, files)

    def _judgments(self, name: str, judge: str, grades: Sequence[tuple[Grade, Grade]]) -> str:
        """As FastChat's model_judgment/<judge>_single.jsonl, but for times and the judge's prompt."""
        lines = []
        for question, both in zip(self._asked, grades, strict=True):
            for turn, own in enumerate(both, 1):
                row = {
                    "question_id": question.id,
                    "model": name,
                    "judge": [judge, own.prompt],
                    "judgment": own.said,
                    "score": NO_RATING if own.rating is None else own.rating,
                    "turn": turn,
                }
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        return "".join(lines)

    def _answers(self, name: str, turns: Sequence[tuple[str, str]]) -> str:
        """As FastChat's model_answer/<model>.jsonl."""
        rows = (
            {"question_id": question.id, "model_id": name, "choices": [{"index": 0, "turns": list(own)}]}
            for question, own in zip(self._asked, turns, strict=True)
        )
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _report(self, found: Mapping[str, Scores], judge: str) -> Report:
        categories = list(dict.fromkeys(own.category for own in self._asked))
        rows = [
            [name, *(number(value, 2) for value in (*own.turns, own.average)), str(sum(own.missing))]
            for name, own in found.items()
        ]
        by_category = [
            [name, *(number(own.categories[category][2], 2) for category in categories)] for name, own in found.items()
        ]
        spread = [f"{category}{end}" for category in categories for end in ("", "_low", "_high")]
        records = [
            (
                name,
                *(cell for value in (*own.turns, own.average) for cell in csv_cells(value)),
                *own.missing,
                own.skipped,
                *(cell for category in categories for cell in csv_cells(own.categories[category][2])),
            )
            for name, own in found.items()
        ]
        figures = [f"{turn}{end}" for turn in ("first_turn", "second_turn", "average") for end in ("", "_low", "_high")]
        return Report(
            name=NAME,
            title="MT-Bench",
            tables=[
                Table(["model", "first turn", "second turn", "average", "missing"], rows, "Ratings"),
                Table(["model", *categories], by_category, "Average by category"),
            ],
            columns=["model", *figures, "missing_first_turn", "missing_second_turn", "skipped", *spread],
            records=records,
            notes=self._notes(found, judge),
        )

    def _notes(self, found: Mapping[str, Scores], judge: str) -> list[str]:
        config, count = self._config, len(self._asked)
        subset = "" if count == OFFICIAL_QUESTIONS else f" The benchmark has {OFFICIAL_QUESTIONS}: not its figures."
        missing = "; ".join(
            f"{name} {own.missing[0]} and {own.missing[1]} ({own.skipped} skipped)" for name, own in found.items()
        )
        return [
            f"{count} questions of two turns, each turn rated from 1 to 10; the average is over all ratings.{subset}",
            f"Judge: {judge}, temperature 0, at most {config.judge.max_tokens or MAX_TOKENS} tokens; reference answers "
            f"of {config.benchmark.reference} for {', '.join(WITH_REFERENCE)}. Judgments of the first and the second "
            f"turn without a rating, which are in no mean: {missing}. In brackets: 95 % intervals, "
            f"{config.bootstrap_samples} bootstrap samples of questions, seed {config.seed}.",
        ]


def _results(own: Scores, questions: int) -> dict[str, object]:
    names = ("first_turn", "second_turn", "average")
    return {
        **{name: vars(value) for name, value in zip(names, (*own.turns, own.average), strict=True)},
        "categories": {
            category: {name: vars(value) for name, value in zip(names, of, strict=True)}
            for category, of in own.categories.items()
        },
        "questions": questions,
        "missing_first_turn": own.missing[0],
        "missing_second_turn": own.missing[1],
        "skipped": own.skipped,
    }


def _turns(answer: Answer) -> tuple[str, str]:
    """Drawn here, answers lose blanks around them, as FastChat's own do; ready ones are as they are given."""
    first, second = answer.turns
    return (first, second) if answer.tokens is None else (first.strip(), second.strip())


def _files(config: MTBenchConfig) -> tuple[Path, Path, Path]:
    """Questions, judge's prompts, reference answers: from the folder, an installed FastChat, or the hub."""
    reference = f"reference_answer/{config.reference}.jsonl"
    if config.folder is not None:
        folder = Path(config.folder).expanduser()
        return folder / QUESTION, folder / PROMPT_FILE, folder / reference
    names = (f"data/{NAME}/{QUESTION}", f"data/{PROMPT_FILE}", f"data/{NAME}/{reference}")
    found = find_spec("fastchat")
    for place in (found.submodule_search_locations or ()) if found else ():
        first, second, third = (Path(place) / "llm_judge" / name for name in names)
        if first.is_file():
            return first, second, third
    from huggingface_hub import hf_hub_download

    try:
        first, second, third = (Path(hf_hub_download(SPACE, name, repo_type="space")) for name in names)
    except Exception as error:  # of whatever the hub's client, or what is beneath it, raises
        raise DataError(f"benchmark.folder=null: {SPACE} cannot be had ({reason(error)}); {REMEDY}") from error
    return first, second, third


def _prompts(path: Path) -> dict[str, JudgePrompt]:
    rows, found = by_id(read_rows(path), "name"), {}
    for (has_reference, turn), name in PROMPTS.items():
        if name not in rows:
            raise DataError(f"{path}: no prompt named {name}; give FastChat's {PROMPT_FILE}, unchanged")
        row = rows[name]
        template, wanted = row.text("prompt_template"), needed_fields(has_reference, turn)
        if set(fields(template)) != set(wanted):
            shown = ", ".join(f"{{{field}}}" for field in wanted)
            raise DataError(f"{row.origin}: the fields of {name}'s prompt_template are not {shown}; correct the row")
        found[name] = JudgePrompt(name, row.text("system_prompt"), template)
    return found


def _choice(row: Row) -> tuple[str, str]:
    choices = row.values.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return _two(row, choice.get("turns") if isinstance(choice, dict) else None, "choices[0].turns")


def _two(row: Row, turns: object, name: str) -> tuple[str, str]:
    if not isinstance(turns, list) or len(turns) != TURNS or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"{row.origin}: '{name}' is not a list of two texts; correct the row")
    return turns[0], turns[1]
