"""``evaluate mt_bench``: its files, and its report."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.config.evaluation_schema import JudgeConfig, MTBenchConfig, MTBenchEvaluationConfig
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.evaluation.benchmark import Answer
from megatron_aligndistil.evaluation.content_cache import ContentCache
from megatron_aligndistil.evaluation.judge import Endpoint, Judge
from megatron_aligndistil.evaluation.mt_bench import PROMPTS, needed_fields
from megatron_aligndistil.launch.evaluate_mt_bench import prepare
from tests.unit.evaluation.judge_server import serving
from tests.unit.launch.benchmark_files import read_rows, write_rows

DATA = "ALIGNDISTIL_BENCHMARK_DATA"  # a folder with mt_bench, which nobody has to have


def prompt(has_reference: bool, turn: int, **other: Any) -> dict[str, Any]:
    template = " ".join(f"{{{own}}}" for own in needed_fields(has_reference, turn))
    name = PROMPTS[has_reference, turn]
    return {"name": name, "system_prompt": "", "prompt_template": f"{name}: {template}", **other}


def answer(own: int, *turns: str) -> dict[str, Any]:
    return {"question_id": own, "model_id": "m", "choices": [{"index": 0, "turns": list(turns)}]}


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["write\u2028it", "shorter"]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1", "and 2 + 2"]},
]
TABLES = {
    "question.jsonl": QUESTIONS,
    "judge_prompts.jsonl": [{"name": "pair-v2"}, *(prompt(*which) for which in PROMPTS)],
    "reference_answer/gpt-4.jsonl": [answer(111, "2", "4")],
}


def benchmark(folder: Path, **changed: Any) -> MTBenchEvaluationConfig:
    for name, rows in {**TABLES, **changed}.items():
        write_rows(folder / name, rows)
    own = MTBenchConfig(folder=str(folder))
    return MTBenchEvaluationConfig(output=str(folder), judge=JudgeConfig(model="tiny"), benchmark=own)


def test_questions_have_their_categorys_temperature(tmp_path: Path) -> None:
    evaluation = prepare(benchmark(tmp_path))
    asked = [(own.prompt[0]["content"], own.further_turns, own.temperature) for own in evaluation.questions]
    assert asked == [("write\u2028it", ("shorter",), 0.7), ("1 + 1", ("and 2 + 2",), 0.0)]
    assert evaluation.questions[1].origin == f"{tmp_path / 'question.jsonl'}:2"
    assert evaluation.max_new_tokens == 1024


def test_the_report(tmp_path: Path) -> None:
    config = benchmark(tmp_path)
    evaluation = prepare(config)
    ready = write_rows(tmp_path / "m.jsonl", [answer(111, "two", "four"), answer(81, " w ", "s")])
    answers = {"m": evaluation.read_answers("outputs.m", ready), "n": [Answer((" a ", "b\n"), 3)] * 2}
    assert answers["m"] == [Answer((" w ", "s")), Answer(("two", "four"))]

    def say(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        return "none" if "four" in text else "[[8]]" if "multi" in text else "[[3]]"

    with serving(say) as server:
        judge = Judge(Endpoint(server.url, "tiny"), ContentCache(tmp_path / "cache"))
        scored = evaluation.score(answers, judge)
    assert {body["max_tokens"] for body in server.asked} == {2048}
    own = scored.results["m"]
    assert own["first_turn"]["value"] == 3 and own["second_turn"]["value"] == 8
    assert own["average"]["value"] == pytest.approx(14 / 3)
    assert own["categories"]["writing"]["second_turn"]["value"] == 8 and own["questions"] == 2
    assert math.isnan(own["categories"]["math"]["second_turn"]["value"])
    assert (own["missing_first_turn"], own["missing_second_turn"], own["skipped"]) == (0, 1, 0)
    markdown = scored.report.markdown
    assert "| n     | 3.00" in markdown and "| model | writing | math |" in re.sub(" +", " ", markdown)
    assert "2 questions of two turns" in markdown and "The benchmark has 80" in markdown and "Judge: tiny" in markdown
    judgments = read_rows(scored.files["judgments/m.jsonl"])
    assert [(row["question_id"], row["turn"], row["judge"][1]) for row in judgments] == [
        (81, 1, "single-v1"),
        (81, 2, "single-v1-multi-turn"),
        (111, 1, "single-math-v1"),
        (111, 2, "single-math-v1-multi-turn"),
    ]
    again = write_rows(tmp_path / "again.jsonl", scored.files["answers/n.jsonl"].splitlines())
    assert evaluation.read_answers("outputs.n", again) == [Answer(("a", "b"))] * 2
    assert len(scored.report.columns) == len(scored.report.records[0])


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("question.jsonl", [*QUESTIONS, QUESTIONS[0]], r":3: question_id=81 is that of .*:1 too"),
        ("question.jsonl", [{"category": "math", "turns": ["a", "b"]}], r":1: no question_id"),
        ("question.jsonl", [{"question_id": 1, "category": "stem", "turns": ["a"]}], r":1: 'turns' is not a list of"),
        ("question.jsonl", [{"question_id": 1, "turns": ["a", "b"]}], r":1: no text 'category'"),
        ("question.jsonl", ["[1]"], r":1: not a JSON object"),
        ("question.jsonl", ["{"], r":1: not JSON"),
        ("question.jsonl", [], r": no rows"),
        ("reference_answer/gpt-4.jsonl", [answer(1, "a", "b")], r": no row with question 111, whose category math"),
        ("reference_answer/gpt-4.jsonl", [answer(111, "a")], r":1: 'choices\[0\].turns' is not a list of two texts"),
        ("judge_prompts.jsonl", [prompt(False, 0)], r": no prompt named single-math-v1"),
        (
            "judge_prompts.jsonl",
            [prompt(False, 0, prompt_template="{question}"), *(prompt(*own) for own in list(PROMPTS)[1:])],
            r":1: the fields of single-v1's prompt_template are not \{question\}, \{answer\}",
        ),
    ],
)
def test_unusable_files_are_one_line(tmp_path: Path, name: str, rows: list[Any], said: str) -> None:
    config = benchmark(tmp_path, **{name: rows})
    with pytest.raises(DataError, match=said) as caught:
        prepare(config)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([answer(81, "a", "b")], r"no row with question 111, which .*question.jsonl:2 asks"),
        ([answer(81, "a", "b"), answer(5, "a", "b")], r":2: question 5 is not one of .*question.jsonl"),
        ([answer(81, "a", "b"), answer(81, "a", "b")], r":2: question_id=81 is that of .*:1 too"),
        ([answer(81, "a"), answer(111, "a", "b")], r":1: 'choices\[0\].turns' is not a list of two texts"),
    ],
)
def test_unusable_answers_are_one_line(tmp_path: Path, rows: list[Any], said: str) -> None:
    evaluation = prepare(benchmark(tmp_path))
    with pytest.raises(DataError, match=said):
        evaluation.read_answers("outputs.m", write_rows(tmp_path / "m.jsonl", rows))


def test_without_files_the_line_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("megatron_aligndistil.launch.evaluate_mt_bench.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"benchmark.folder=null: .* cannot be had .*; give benchmark.folder"):
        prepare(MTBenchEvaluationConfig(output="x"))


def test_an_installed_fastchat_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "fastchat" / "llm_judge" / "data"
    for name, rows in TABLES.items():
        write_rows(data / (name if name == "judge_prompts.jsonl" else f"mt_bench/{name}"), rows)
    (tmp_path / "fastchat" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert len(prepare(MTBenchEvaluationConfig(output="x")).questions) == 2


@pytest.mark.skipif(DATA not in os.environ, reason=f"{DATA} names no folder with mt_bench")
def test_the_real_files() -> None:
    folder = str(Path(os.environ[DATA]) / "mt_bench")
    evaluation = prepare(MTBenchEvaluationConfig(output="x", benchmark=MTBenchConfig(folder=folder)))
    assert len(evaluation.questions) == 80
    assert sorted(own.temperature for own in evaluation.questions) == [0.0] * 40 + [0.1] * 20 + [0.7] * 20
