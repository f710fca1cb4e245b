"""``evaluate arena_hard``: its files, and its report."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_aligndistil.config.evaluation_schema import ArenaHardConfig, ArenaHardEvaluationConfig, JudgeConfig
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.evaluation.arena_hard import CHARACTERS, Length, style_of
from megatron_aligndistil.evaluation.benchmark import Answer
from megatron_aligndistil.evaluation.content_cache import ContentCache
from megatron_aligndistil.evaluation.judge import Endpoint, Judge
from megatron_aligndistil.launch.evaluate_arena_hard import prepare
from tests.unit.evaluation.judge_server import serving
from tests.unit.launch.benchmark_files import read_rows, write_rows

DATA = "ALIGNDISTIL_BENCHMARK_DATA"  # a folder with arena_hard, which nobody has to have


def old(key: str, text: str) -> dict[str, Any]:
    return {"question_id": key, "model_id": "m", "choices": [{"index": 0, "turns": [{"content": text}]}]}


def new(key: str, text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"answer": text}}]
    return {"uid": key, "model": "m", "messages": messages}


QUESTIONS = [{"question_id": "a", "turns": [{"content": "first"}]}, {"uid": "b", "prompt": "second"}]
BASELINE = [new("b", "base b"), old("a", "base a")]


def benchmark(
    folder: Path, questions: Any = QUESTIONS, baseline: Any = BASELINE, **own: Any
) -> ArenaHardEvaluationConfig:
    write_rows(folder / "question.jsonl", questions)
    write_rows(folder / "model_answer" / "gpt-4-0314.jsonl", baseline)
    keys = ArenaHardConfig(folder=str(folder), **own)
    return ArenaHardEvaluationConfig(
        output=str(folder), judge=JudgeConfig(model="tiny"), benchmark=keys, bootstrap_samples=50
    )


def test_both_formats_are_read_in_any_order(tmp_path: Path) -> None:
    evaluation = prepare(benchmark(tmp_path))
    assert [own.prompt[0]["content"] for own in evaluation.questions] == ["first", "second"]
    assert evaluation.baseline == [Answer(("base a",)), Answer(("base b",))]
    assert evaluation.max_new_tokens == 4096 and {own.temperature for own in evaluation.questions} == {0.0}


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two models one wins a question twice and strongly once, the other nothing."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    template = {"system_prompt": "Judge.", "prompt_template": ["{question_1}|{answer_1}|{answer_2}"]}
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(template), encoding="utf-8")
    verdicts = {
        "first|base a|good": "[[B>>A]]",
        "first|good|base a": "[[A>B]]",
        "second|base b|fine": "[[A=B]]",
        "second|fine|base b": "neither",
    }
    evaluation = prepare(benchmark(tmp_path, judge_prompt=str(tmp_path / "judge.yaml")))

    def say(body: dict[str, Any]) -> str:
        shown = body["messages"][1]["content"]
        return verdicts.get(shown, "[[A>>B]]" if "|base" in shown.partition("|bad")[0] else "[[B>>A]]")

    answers = {"m": [Answer(("good",)), Answer(("fine",))], "zero": [Answer(("bad",)), Answer(("bad",))]}
    with serving(say) as server:
        judge = Judge(Endpoint(server.url, "tiny"), ContentCache(tmp_path / "cache"))
        scored = evaluation.score(answers, judge)
    own, zero = scored.results["m"], scored.results["zero"]
    assert own["win_rate_percent"]["value"] == pytest.approx(100 * 4.5 / 5, abs=1e-6)
    assert (own["games"], own["unreadable"], own["asked_again"], own["battles"]) == (4, 1, 1, 5)
    assert zero["win_rate_percent"] == {"value": 0.0, "low": 0.0, "high": 0.0} and zero["battles"] == 12
    assert 0 < zero["style_controlled_win_rate_percent"]["value"] < own["style_controlled_win_rate_percent"]["value"]
    assert own["answer_length"] == {"unit": CHARACTERS, "mean": 4.0}
    assert own["judge_prompt"]["from"].endswith("judge.yaml") and len(own["judge_prompt"]["sha256"]) == 64
    pool = own["style_control"]
    assert pool == zero["style_control"] and pool["models"] == ["gpt-4-0314", "m", "zero"] and pool["battles"] == 17
    lengths = [*[(4 - 6) / 11] * 5, *[(3 - 6) / 10] * 12]
    assert pool["features"]["length"]["mean"] == pytest.approx(np.mean(lengths), abs=1e-12)
    assert pool["features"]["length"]["standard_deviation"] == pytest.approx(np.std(lengths), abs=1e-12)
    assert "compare only inside their pool" in scored.report.markdown and "Judge: tiny" in scored.report.markdown
    assert len(scored.report.columns) == len(scored.report.records[0])
    assert [[game["score"] for game in row["games"]] for row in read_rows(scored.files["judgments/m.jsonl"])] == [
        ["B>>A", "A>B"],
        ["A=B", None],
    ]
    again = write_rows(tmp_path / "again.jsonl", scored.files["answers/m.jsonl"].splitlines())
    assert evaluation.read_answers("outputs.m", again) == answers["m"]


def test_another_pool_has_another_id(tmp_path: Path) -> None:
    evaluation = prepare(benchmark(tmp_path))
    one, two = [Answer(("x",)), Answer(("yy",))], [Answer(("- z",)), Answer(("w",))]
    with serving(lambda body: "[[A>B]]") as server:
        judge = Judge(Endpoint(server.url, "tiny"), ContentCache(tmp_path / "cache"))
        found = [
            evaluation.score(answers, judge).results["m"] for answers in ({"m": one}, {"m": one}, {"m": one, "n": two})
        ]
    ids = [own["style_control"]["pool"] for own in found]
    assert ids[0] == ids[1] != ids[2]
    assert {own["win_rate_percent"]["value"] for own in found} == {50.0}
    assert found[0]["judge_prompt"]["from"] == "built-in"


def test_style_control_can_be_left_out(tmp_path: Path) -> None:
    evaluation = prepare(benchmark(tmp_path, style_control=False))
    with serving(lambda body: "?") as server:
        judge = Judge(Endpoint(server.url, "tiny"), ContentCache(tmp_path / "cache"))
        scored = evaluation.score({"m": [Answer(("x",)), Answer(("y",))]}, judge)
    assert math.isnan(scored.results["m"]["win_rate_percent"]["value"]) and scored.results["m"]["unreadable"] == 4
    assert "style" not in scored.report.markdown and "style_control" not in scored.results["m"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"questions": [*QUESTIONS, QUESTIONS[1]]}, r"question.jsonl:3: question_id=b is that of .*:2 too"),
        ({"questions": [{"uid": "a"}]}, r"question.jsonl:1: neither a text 'prompt' nor one turn"),
        ({"questions": [{"prompt": "a"}]}, r"question.jsonl:1: no question_id or uid"),
        ({"baseline": BASELINE[:1]}, r"gpt-4-0314.jsonl: no row with question a, which .*question.jsonl:1 asks"),
        ({"baseline": [*BASELINE, old("c", "x")]}, r"gpt-4-0314.jsonl:3: question c is not one of .*question.jsonl;"),
        ({"baseline": [*BASELINE, old("a", "x")]}, r"gpt-4-0314.jsonl:3: question_id=a is that of .*:2 too"),
        ({"baseline": [BASELINE[0], {"uid": "a", "choices": [{}]}]}, r"gpt-4-0314.jsonl:2: no answer's text"),
        ({"baseline": []}, r"benchmark.baseline=gpt-4-0314: .*: no rows"),
    ],
)
def test_unusable_files_are_one_line(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    config = benchmark(tmp_path, **changed)
    with pytest.raises(DataError, match=said) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not a YAML file"),
        ("system_prompt: x", "no text system_prompt and list prompt_template"),
        (json.dumps({"system_prompt": "x", "prompt_template": ["{question_1} {answer_1}"]}), "the fields of"),
        (json.dumps({"system_prompt": "x", "prompt_template": [1]}), "no text system_prompt"),
    ],
)
def test_an_unusable_prompt_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "judge.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"benchmark.judge_prompt=.*: {said}"):
        prepare(benchmark(tmp_path, judge_prompt=str(tmp_path / "judge.yaml")))


def test_a_models_name_is_not_the_baselines(tmp_path: Path) -> None:
    config = benchmark(tmp_path)
    config.outputs = {"gpt-4-0314": "x"}
    with pytest.raises(ConfigError, match=r"outputs.gpt-4-0314: the baseline has this name"):
        prepare(config)


@pytest.mark.skipif(DATA not in os.environ, reason=f"{DATA} names no folder with arena_hard")
def test_the_real_files_styles_are_upstreams() -> None:
    folder = Path(os.environ[DATA]) / "arena_hard"
    evaluation = prepare(ArenaHardEvaluationConfig(output="x", benchmark=ArenaHardConfig(folder=str(folder))))
    assert len(evaluation.questions) == len(evaluation.baseline) == 500
    for row in read_rows((folder / "model_answer" / "gpt-4-0613.jsonl").read_text(encoding="utf-8")):
        counted = [sum(row["metadata"][f"{name}_count"].values()) for name in ("header", "list", "bold")]
        style = style_of(row["messages"][-1]["content"]["answer"], Length(CHARACTERS, len))
        assert style[1:].tolist() == counted
