"""AlpacaEval from files to figures, with a judge that looks only at length."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_aligndistil.config.evaluation_schema import (
    AlpacaEvalConfig,
    AlpacaEvalEvaluationConfig,
    EvaluationModelConfig,
)
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.evaluation.alpaca_eval import DIFFICULTY, GAMED, INSTALL
from megatron_aligndistil.evaluation.benchmark import Answer
from megatron_aligndistil.evaluation.content_cache import ContentCache
from megatron_aligndistil.evaluation.judge import Endpoint, Judge
from megatron_aligndistil.launch.evaluate_alpaca_eval import REFERENCE, ROWS, AlpacaEval, prepare
from megatron_aligndistil.launch.evaluation_task import Scored
from tests.unit.evaluation.alpaca_eval_data import by_length, write_csv_files
from tests.unit.evaluation.judge_server import JudgeServer, serving

DATA = os.environ.get("ALIGNDISTIL_BENCHMARK_DATA")
Change = Callable[[list[Any]], object]
Edit = Callable[[Path], object]
SLOPE = 2.0
# The official gamed baselines' own liking of length, which the fit shares with every model: another judge's would have
# to be told from quality by a fit that has one slope for both.
OFFICIAL_SLOPE = 1.45


def config_for(folder: Path | str, output: Path, **further: object) -> AlpacaEvalEvaluationConfig:
    benchmark = AlpacaEvalConfig(folder=str(folder))
    return AlpacaEvalEvaluationConfig(output=str(output), model=EvaluationModelConfig(), benchmark=benchmark, **further)


def made_outputs(generator: str, mean: float) -> list[dict[str, str]]:
    lengths = np.random.default_rng(len(generator)).normal(mean, 150, ROWS).clip(1).astype(int)
    return [
        {"dataset": "made", "instruction": f"question {row}", "output": generator[0] * length, "generator": generator}
        for row, length in enumerate(lengths)
    ]


def write_benchmark(folder: Path) -> None:
    write_csv_files(folder, ROWS, length_slope=SLOPE)
    (folder / REFERENCE).write_text(json.dumps(made_outputs("the reference", 900)))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alpaca_eval")
    write_benchmark(folder)
    (folder / "model_outputs.json").write_text(json.dumps(made_outputs("short", 700)))
    return folder


def scale_of(folder: Path) -> float:
    """The standard deviation of length differences, by which the fit standardises them."""
    reference, own = (json.loads((folder / name).read_text()) for name in (REFERENCE, "model_outputs.json"))
    return statistics.stdev(len(a["output"]) - len(b["output"]) for a, b in zip(reference, own, strict=True))


@dataclass(frozen=True)
class Run:
    evaluation: AlpacaEval
    answers: list[Answer]
    scored: Scored
    judge: Judge
    server: JudgeServer
    package: tuple[dict[str, float], dict[str, float]]


def package_files() -> dict[str, float]:
    import alpaca_eval

    folder = Path(alpaca_eval.__file__).parent
    return {str(path): path.stat().st_mtime for path in folder.rglob("*") if path.suffix != ".pyc"}


def scored_by_length(folder: Path, output: Path, slope: float) -> Iterator[Run]:
    evaluation = prepare(config_for(folder, output))
    answers = evaluation.read_answers("outputs.short", folder / "model_outputs.json")
    before = package_files()
    with serving(functools.partial(by_length, slope, scale_of(folder))) as server:
        judge = Judge(Endpoint(server.url, "tiny"), ContentCache(output / "cache"))
        scored = evaluation.score({"short": answers}, judge)
        yield Run(evaluation, answers, scored, judge, server, (before, package_files()))


@pytest.fixture(scope="module")
def run(benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield from scored_by_length(benchmark, tmp_path_factory.mktemp("output"), SLOPE)


def test_a_judge_of_length_gives_a_length_controlled_rate_of_fifty(run: Run) -> None:
    figures = run.scored.results["short"]
    assert figures["win_rate_percent"]["value"] < 35
    assert figures["length_controlled_win_rate_percent"]["value"] == pytest.approx(50, abs=2)
    assert (figures["rows"], figures["judged"], figures["unparsed"], figures["skipped"]) == (ROWS, ROWS, 0, 0)
    assert figures["wins"] + figures["losses"] + figures["draws"] == ROWS
    assert figures["answer_characters"] == statistics.fmean(len(own.turns[0]) for own in run.answers)
    assert len(run.server.asked) == ROWS == run.judge.usage.answered


@pytest.mark.skipif(DATA is None, reason="ALIGNDISTIL_BENCHMARK_DATA names no folder")
def test_a_judge_of_length_with_the_official_files(tmp_path: Path) -> None:
    assert DATA is not None
    (found,) = scored_by_length(Path(DATA) / "alpaca_eval", tmp_path, OFFICIAL_SLOPE)
    figures = found.scored.results["short"]
    assert figures["win_rate_percent"]["value"] < 35 and figures["judged"] == ROWS
    assert figures["length_controlled_win_rate_percent"]["value"] == pytest.approx(50, abs=2)


@pytest.mark.filterwarnings("ignore::FutureWarning:sklearn")
def test_figures_are_the_librarys_of_the_raw_judgments(run: Run, benchmark: Path, tmp_path: Path) -> None:
    """Its metric, called on what was written, with the files where its own download would have put them."""
    import sklearn
    from alpaca_eval import constants, metrics
    from huggingface_hub import constants as hub

    judgments = [json.loads(line) for line in run.scored.files["judgments/short.jsonl"].splitlines()]
    reference = json.loads((benchmark / REFERENCE).read_text())
    written = json.loads(run.scored.files["answers/short.json"])
    assert [own["instruction"] for own in written] == [own["instruction"] for own in reference]
    assert {(own["dataset"], own["generator"]) for own in written} == {("made", "short")}
    rows = [
        {"output_1": own["output"], "output_2": answer["output"], "generator_1": "a", "generator_2": "b"}
        | {"preference": said["preference"]}
        for own, answer, said in zip(reference, written, judgments, strict=True)
    ]
    cached = tmp_path / "datasets--tatsu-lab--alpaca_eval"
    for name, text in {
        "refs/main": "1" * 40,
        f"snapshots/{'1' * 40}/{GAMED}": (benchmark / GAMED).read_text(),
    }.items():
        (cached / name).parent.mkdir(parents=True, exist_ok=True)
        (cached / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch, sklearn.config_context():
        patch.setattr(constants, "DEFAULT_CACHE_DIR", str(tmp_path))
        patch.setattr(hub, "HF_HUB_OFFLINE", True)
        found = metrics.get_length_controlled_winrate(rows, save_weights_dir=None)
    figures = run.scored.results["short"]
    assert figures["win_rate_percent"]["value"] == pytest.approx(found["win_rate"], abs=1e-9)
    assert figures["length_controlled_win_rate_percent"]["value"] == pytest.approx(
        found["length_controlled_winrate"], abs=1e-9
    )
    for ours, theirs in (
        ("win_rate_standard_error_percent", "standard_error"),
        ("length_controlled_standard_error_percent", "lc_standard_error"),
        ("discrete_win_rate_percent", "discrete_win_rate"),
    ):
        assert figures[ours] == pytest.approx(found[theirs], abs=1e-9)
    assert (figures["wins"], figures["losses"]) == (found["n_wins"], found["n_wins_base"])


def test_judgments_tell_the_order_that_was_shown(run: Run) -> None:
    for line in run.scored.files["judgments/short.jsonl"].splitlines():
        own = json.loads(line)
        likely = {told["token"]: told["logprob"] for told in own["reply"]["logprobs"]["content"][0]["top_logprobs"]}
        for_model = math.exp(likely["M" if own["first"] == "reference" else "m"])
        assert own["preference"] - 1 == pytest.approx(for_model, abs=1e-9)


def test_the_package_stays_as_it_was(run: Run) -> None:
    before, after = run.package
    assert len(before) > 100 and after == before


def test_again_nothing_is_asked_and_nothing_is_another(run: Run) -> None:
    """Now as if the answers had been drawn here: as the library's own, they lose the blanks around them."""
    drawn = [Answer((f" {own.turns[0]}\n",), tokens=5) for own in run.answers]
    assert run.evaluation.score({"short": drawn}, run.judge) == run.scored
    assert len(run.server.asked) == ROWS


def test_the_questions(run: Run) -> None:
    questions = run.evaluation.questions
    assert len(questions) == ROWS and questions[4].prompt == ({"role": "user", "content": "question 4"},)
    assert questions[4].origin.endswith(f"{REFERENCE}:5") and questions[4].temperature == 0.7


def test_the_table(run: Run) -> None:
    table, note = run.scored.report.markdown.split("\n\n")[1:3]
    assert "| short |" in table and "the reference" in note
    (line,) = run.scored.report.csv.splitlines()[1:]
    assert line.startswith("short,") and line.count(",") == run.scored.report.csv.splitlines()[0].count(",")


def _rows(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads(path.read_text())
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:3] + rows[4:], r"804 rows, without the instruction of row 4 of .*; add"),
        (lambda rows: [*rows, rows[2]], r"outputs\.json:806: the instruction of row 3 again; remove"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], r"outputs\.json:1: its instruction is row 2 of .*bring the rows"),
        (lambda rows: [{**rows[0], "instruction": "what?"}, *rows[1:]], r"outputs\.json:1: its instruction is not one"),
        (lambda rows: [{**rows[0], "output": None}, *rows[1:]], r"outputs\.json:1: no texts .*correct the row"),
        (lambda rows: {"rows": rows}, r"^outputs\.short=.*: not a list of rows"),
    ],
)
def test_ready_answers_that_are_wrong(run: Run, benchmark: Path, tmp_path: Path, change: Change, message: str) -> None:
    path = tmp_path / "outputs.json"
    path.write_text(json.dumps(change(_rows(benchmark / "model_outputs.json"))))
    with pytest.raises(DataError, match=message) as caught:
        run.evaluation.read_answers("outputs.short", path)
    assert "\n" not in str(caught.value)


def _edit_lines(name: str, change: Change) -> Edit:
    def edit(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join(change(lines)) + "\n")

    return edit


def _edit_rows(change: Change) -> Edit:
    return lambda folder: (folder / REFERENCE).write_text(json.dumps(change(_rows(folder / REFERENCE))))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / GAMED).unlink(), r"df_gamed\.csv: .*give benchmark\.folder"),
        (lambda folder: (folder / REFERENCE).write_text("{"), r"reference_outputs\.json: not a JSON file"),
        (_edit_rows(lambda rows: rows[:-1]), r"reference_outputs\.json: 804 rows, the benchmark has 805; give"),
        (_edit_rows(lambda rows: [*rows[:-1], rows[0]]), r"outputs\.json:805: the instruction of row 1 again"),
        (_edit_lines(GAMED, lambda own: [own[0], own[2], own[1], *own[3:]]), r"gamed\.csv:2: index=1, where 0 belongs"),
        (_edit_lines(GAMED, lambda own: own[:800]), r"gamed\.csv: 799 rows"),
        (_edit_lines(GAMED, lambda own: ["a,b", *own[1:]]), r"gamed\.csv:1: no column preference, index"),
        (_edit_lines(GAMED, lambda own: [*own, own[1].replace(",0,", ",805,", 1)]), r":1612: index=805, not one of"),
        (
            _edit_lines(GAMED, lambda own: [*own[:3], "x" + own[3], *own[4:]]),
            r"gamed\.csv:4: preference='x0.*not a num",
        ),
        (_edit_lines(GAMED, lambda own: [*own[:3], own[3].replace("False", "True"), *own[4:]]), r":4: not_gamed_base"),
        (_edit_lines(DIFFICULTY, lambda own: own[:-2]), r"difficulty\.csv: 803 rows"),
        (
            _edit_lines(DIFFICULTY, lambda own: [*own[:5], "4,9.0", *own[6:]]),
            r":6: another instruction_difficulty than",
        ),
        (_edit_lines(DIFFICULTY, lambda own: [*own, "805,1.0"]), r"difficulty\.csv:807: more than 805 rows"),
    ],
)
def test_benchmark_files_that_are_wrong(tmp_path: Path, edit: Edit, message: str) -> None:
    write_benchmark(tmp_path)
    edit(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        prepare(config_for(tmp_path, tmp_path / "output"))
    assert "\n" not in str(caught.value) and not (tmp_path / "output").exists()


def test_a_model_of_the_references_name(benchmark: Path, tmp_path: Path) -> None:
    rows = [{**own, "generator": "gpt"} for own in _rows(benchmark / REFERENCE)]
    write_csv_files(tmp_path, ROWS)
    (tmp_path / REFERENCE).write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=r"^outputs\.gpt: the reference outputs have this name; rename it$"):
        prepare(config_for(tmp_path, tmp_path / "output", outputs={"gpt": "x.json"}))


def test_files_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"^benchmark\.folder=null: .* cannot be had \(.*\); give benchmark\.folder"):
        prepare(AlpacaEvalEvaluationConfig(output=str(tmp_path), model=EvaluationModelConfig()))


def test_the_library_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    with pytest.raises(ConfigError, match=re.escape(INSTALL)):
        prepare(config_for(tmp_path, tmp_path / "output"))
