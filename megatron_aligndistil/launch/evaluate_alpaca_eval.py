"""``aligndistil evaluate alpaca_eval`` (paper Table 1): win rates over the reference, raw and length-controlled."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_aligndistil.config.evaluation_rules import models_of
from megatron_aligndistil.config.evaluation_schema import AlpacaEvalEvaluationConfig
from megatron_aligndistil.config.json_text import parse_text
from megatron_aligndistil.errors import ConfigError, DataError, reason
from megatron_aligndistil.evaluation.alpaca_eval import (
    DIFFICULTY,
    GAMED,
    REPOSITORY,
    Figures,
    Judgment,
    Pair,
    check_installed,
    figures,
    judge_pairs,
    judgment_line,
)
from megatron_aligndistil.evaluation.benchmark import Answer, Question
from megatron_aligndistil.evaluation.benchmark_rows import read_text
from megatron_aligndistil.evaluation.judge import Judge
from megatron_aligndistil.launch.evaluation_task import Evaluation, Scored
from megatron_aligndistil.report.analysis import Report, Table, csv_cells, number

NAME = "alpaca_eval"
ROWS = 805  # of the benchmark
REFERENCE = "reference_outputs.json"
REMEDY = f"give benchmark.folder with the files of {REPOSITORY}, unchanged"
TEMPERATURE, MAX_NEW_TOKENS = 0.7, 2048  # of most of the library's own configurations of open models
GAMED_COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "model")
FORM = "[{instruction: text, output: text, …}, …]"

_ON_HUB = {REFERENCE: "alpaca_eval_gpt4_baseline.json", GAMED: GAMED, DIFFICULTY: DIFFICULTY}
_CLOSE = 1e-6  # the two files' difficulties, which are written with different digits


def prepare(config: AlpacaEvalEvaluationConfig) -> AlpacaEval:
    """The library, the reference's rows and the files of the length-controlled rate, checked.

    The rows' places matter, since an instruction's difficulty is looked up by its place.

    Raises:
        ConfigError: the library cannot be imported, or a model has the reference's name.
        DataError: a file cannot be had or read, or a row of one is missing, there twice, or out of order.
    """
    check_installed()
    files = _files(config.benchmark.folder)
    reference = _outputs(str(files[REFERENCE]), files[REFERENCE])
    if len(reference) != ROWS:
        raise DataError(f"{files[REFERENCE]}: {len(reference)} rows, the benchmark has {ROWS}; {REMEDY}")
    _check_unique(files[REFERENCE], reference)
    _check_difficulty(files, ROWS)
    generator = str(reference[0].get("generator", "reference"))
    for section, names in (("models", models_of(config)), ("outputs", config.outputs)):
        if generator in names:
            raise ConfigError(f"{section}.{generator}: the reference outputs have this name; rename it")
    return AlpacaEval(config, files, reference, generator)


class AlpacaEval(Evaluation):
    """Answers to single instructions against the reference's, by a judge's log-probabilities."""

    max_new_tokens = MAX_NEW_TOKENS

    def __init__(
        self,
        config: AlpacaEvalEvaluationConfig,
        files: Mapping[str, Path],
        reference: Sequence[Mapping[str, Any]],
        generator: str,
    ) -> None:
        self._config, self._files, self._reference, self._generator = config, files, reference, generator
        self.questions = [
            Question(
                f"{files[REFERENCE]}:{row}",
                ({"role": "user", "content": own["instruction"]},),
                temperature=TEMPERATURE,
            )
            for row, own in enumerate(reference, 1)
        ]

    def read_answers(self, key: str, path: Path) -> list[Answer]:
        """The library's model_outputs.json."""
        outputs = _outputs(f"{key}={path}", path)
        places = {own["instruction"]: place for place, own in enumerate(self._reference, 1)}
        _check_unique(path, outputs)
        for row, own in enumerate(outputs, 1):
            if own["instruction"] not in places:
                raise DataError(f"{path}:{row}: its instruction is not one of {self._files[REFERENCE]}; remove the row")
        there = {own["instruction"] for own in outputs}
        for instruction, place in places.items():
            if instruction not in there:
                raise DataError(
                    f"{path}: {len(outputs)} rows, without the instruction of row {place} of {self._files[REFERENCE]}; "
                    "add its answer there"
                )
        for row, own in enumerate(outputs, 1):
            if places[own["instruction"]] != row:
                raise DataError(
                    f"{path}:{row}: its instruction is row {places[own['instruction']]} of {self._files[REFERENCE]}; "
                    "bring the rows into that order, by which difficulty is looked up"
                )
        return [Answer((own["output"],)) for own in outputs]

    def score(self, answers: Mapping[str, Sequence[Answer]], judge: Judge | None) -> Scored:
        """Every model against the reference."""
        assert judge is not None
        found: dict[str, Figures] = {}
        files: dict[str, str] = {}
        folder = Path(self._config.output).expanduser() / NAME / "evaluators"
        for name, own in answers.items():
            pairs = [
                Pair(row["instruction"], row["output"], _text(answer))
                for row, answer in zip(self._reference, own, strict=True)
            ]
            names = (self._generator, name)
            judgments = judge_pairs(judge, folder, pairs, names, self._config.judge.max_tokens)
            found[name] = figures(self._files, pairs, judgments)
            files[f"answers/{name}.json"] = self._answers(name, pairs)
            files[f"judgments/{name}.jsonl"] = self._judgments(judgments)
        results = {name: _results(own, len(self.questions)) for name, own in found.items()}
        return Scored(self._report(found, judge.endpoint.model), results, files)

    def _answers(self, name: str, pairs: Sequence[Pair]) -> str:
        """As the library's model_outputs.json."""
        rows = []
        for own, pair in zip(self._reference, pairs, strict=True):
            dataset = {"dataset": own["dataset"]} if "dataset" in own else {}
            rows.append({**dataset, "instruction": pair.instruction, "output": pair.output, "generator": name})
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"

    def _judgments(self, judgments: Sequence[Judgment]) -> str:
        rows = zip(self.questions, judgments, strict=True)
        return "".join(judgment_line(question.origin, own) for question, own in rows)

    def _report(self, found: Mapping[str, Figures], judge: str) -> Report:
        header = ["model", "LC win rate, %", "win rate, %", "wins/losses/draws", "characters", "judged"]
        rows, records = [], []
        for name, own in found.items():
            counts = f"{own.wins}/{own.losses}/{own.draws}"
            controlled, rate = number(own.length_controlled, 1), number(own.win_rate, 1)
            rows.append([name, controlled, rate, counts, f"{own.characters:.0f}", str(own.judged)])
            errors = (own.length_controlled_error, own.win_rate_error, own.discrete_win_rate)
            counted = (own.wins, own.losses, own.draws, own.judged, own.unparsed, own.skipped, own.characters)
            records.append((name, *csv_cells(own.length_controlled), *csv_cells(own.win_rate), *errors, *counted))
        unparsed = ", ".join(f"{name} {own.unparsed} and {own.skipped}" for name, own in found.items())
        return Report(
            name=NAME,
            title="AlpacaEval 2",
            tables=[Table(header, rows)],
            columns=(
                *("model", "length_controlled_win_rate_percent", "length_controlled_low", "length_controlled_high"),
                *("win_rate_percent", "win_rate_low", "win_rate_high"),
                *("length_controlled_standard_error_percent", "win_rate_standard_error_percent"),
                *("discrete_win_rate_percent", "wins", "losses", "draws", "judged", "unparsed", "skipped"),
                "answer_characters",
            ),
            records=records,
            notes=[
                f"{len(self.questions)} instructions against {self._generator}, by the library alpaca_eval. Judge: "
                f"{judge}, weighted by its log-probabilities. Judgments without a preference, and requests skipped: "
                f"{unparsed}; they count for nobody. In brackets: 95 % intervals, ± 1.96 of the library's standard "
                "errors; that of LC is the spread of what the fit predicts for the instructions, not of the fit.",
            ],
        )


def _text(answer: Answer) -> str:
    """Drawn here, an answer loses blanks around it, as the library's own do; ready ones are as they are given."""
    return answer.turns[0] if answer.tokens is None else answer.turns[0].strip()


def _results(own: Figures, rows: int) -> dict[str, object]:
    return {
        "length_controlled_win_rate_percent": vars(own.length_controlled),
        "win_rate_percent": vars(own.win_rate),
        "length_controlled_standard_error_percent": own.length_controlled_error,
        "win_rate_standard_error_percent": own.win_rate_error,
        "discrete_win_rate_percent": own.discrete_win_rate,
        "wins": own.wins,
        "losses": own.losses,
        "draws": own.draws,
        "rows": rows,
        "judged": own.judged,
        "unparsed": own.unparsed,
        "skipped": own.skipped,
        "answer_characters": own.characters,
    }


def _files(folder: str | None) -> dict[str, Path]:
    if folder is not None:
        return {name: Path(folder).expanduser() / name for name in _ON_HUB}
    from huggingface_hub import hf_hub_download

    try:
        return {
            name: Path(hf_hub_download(repo_id=REPOSITORY, filename=file, repo_type="dataset"))
            for name, file in _ON_HUB.items()
        }
    except Exception as error:  # of whatever the hub's client, or what is beneath it, raises
        raise DataError(f"benchmark.folder=null: {REPOSITORY} cannot be had ({reason(error)}); {REMEDY}") from error


def _outputs(what: str, path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list with instructions and outputs; ``what``: the file, for messages."""
    try:
        rows = parse_text(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{what}: not a JSON file in UTF-8 ({reason(error)}); {FORM} is wanted") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{what}: not a list of rows; {FORM} is wanted")
    for row, own in enumerate(rows, 1):
        if not isinstance(own, dict) or not all(isinstance(own.get(key), str) for key in ("instruction", "output")):
            raise DataError(f"{path}:{row}: no texts 'instruction' and 'output'; correct the row, {FORM} is wanted")
    return rows


def _check_unique(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    first: dict[str, int] = {}
    for row, own in enumerate(rows, 1):
        if (before := first.setdefault(own["instruction"], row)) != row:
            raise DataError(f"{path}:{row}: the instruction of row {before} again; remove one of them")


@dataclass(frozen=True)
class _Line:
    """A CSV row: its place in the file, and its cells."""

    origin: str
    cells: Mapping[str, str]

    def number(self, column: str) -> float:
        try:
            value = float(self.cells[column])
        except (ValueError, TypeError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{self.origin}: {column}={self.cells[column]!r}: not a number; {REMEDY}")
        return value


def _lines(path: Path, columns: Sequence[str]) -> Iterator[_Line]:
    reader = csv.DictReader(read_text(path, str(path), REMEDY).splitlines())
    lacking = [column for column in columns if column not in (reader.fieldnames or ())]
    if lacking:
        raise DataError(f"{path}:1: no column {', '.join(lacking)}; {REMEDY}")
    for cells in reader:
        yield _Line(f"{path}:{reader.line_num}", cells)


def _check_difficulty(files: Mapping[str, Path], rows: int) -> None:
    """The library takes difficulty from the gamed baselines' file, by the first ``rows`` lines' places."""
    gamed = list(_lines(files[GAMED], GAMED_COLUMNS))
    difficulty = list(_lines(files[DIFFICULTY], ("index", "instruction_difficulty")))
    for line in gamed:
        for column in ("preference", "std_delta_len", "instruction_difficulty"):
            line.number(column)
        if line.cells["not_gamed_baseline"] != "False":
            raise DataError(
                f"{line.origin}: not_gamed_baseline={line.cells['not_gamed_baseline']}, not False; {REMEDY}"
            )
    for path, lines in ((files[GAMED], gamed), (files[DIFFICULTY], difficulty)):
        for place, line in enumerate(lines[:rows]):
            if line.number("index") != place:
                raise DataError(f"{line.origin}: index={line.cells['index']}, where {place} belongs; {REMEDY}")
        if len(lines) < rows:
            raise DataError(f"{path}: {len(lines)} rows, an instruction each of {rows} is wanted; {REMEDY}")
    for line in gamed[rows:]:
        if line.number("index") not in range(rows):
            raise DataError(f"{line.origin}: index={line.cells['index']}, not one of {rows} instructions; {REMEDY}")
    for line in gamed:
        other = difficulty[int(line.number("index"))]
        if abs(line.number("instruction_difficulty") - other.number("instruction_difficulty")) > _CLOSE:
            raise DataError(f"{line.origin}: another instruction_difficulty than {other.origin}; {REMEDY}")
    if len(difficulty) > rows:
        raise DataError(f"{difficulty[rows].origin}: more than {rows} rows; {REMEDY}")
