"""The paper's benchmarks by the program, offline, with folders and a judge of the test's own making."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.analysis_setting import TP2
from tests.integration.benchmark_folders import write_alpaca_eval, write_arena_hard, write_mt_bench
from tests.integration.program import run, write_model
from tests.unit.evaluation.alpaca_eval_data import told
from tests.unit.evaluation.judge_server import JudgeServer, Response, serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("benchmarks") / "model", 0)


def evaluate(server: JudgeServer, folder: Path, benchmark: str, *given: str) -> dict[str, Any]:
    """The results of the command, run twice: the second time nothing is asked."""
    argv = [
        benchmark,
        f"output={folder / 'results'}",
        f"cache_dir={folder / 'cache'}",
        f"benchmark.folder={folder / 'files'}",
        f"judge.base_url={server.url}",
        "judge.model=tiny",
        *given,
    ]
    results = []
    for _ in range(2):
        finished = run("evaluate", *argv)
        assert finished.exit_code == 0, finished.errors
        results.append(json.loads((folder / "results" / "results.json").read_text()))
    assert results[0]["models"] == results[1]["models"]
    assert results[0]["judge"]["answered"] == results[1]["judge"]["cached"] == len(server.asked)
    assert results[1]["judge"]["answered"] == 0
    return dict(results[0])


def answering(model: Path) -> tuple[str, ...]:
    return (
        f"model={model}",
        "model.encoder_seq_length=128",
        "trainer.precision=32",
        "sampling.max_new_tokens=6",
    )


def test_mt_bench_of_two_turns_in_two_ranks(model: Path, tmp_path: Path) -> None:
    write_mt_bench(tmp_path / "files")
    with serving(lambda body: "Rating: [[7]]" if "multi-turn" in str(body) else "Rating: [[4]]") as server:
        results = evaluate(server, tmp_path, "mt_bench", *answering(model), *TP2)
    text = json.dumps(results["models"]["model"])
    assert "5.5" in text and "7.0" in text and "4.0" in text
    assert results["answers"]["model"]["answers"] == 2 and len(server.asked) == 4
    answers = (tmp_path / "results" / "answers" / "model.jsonl").read_text()
    turns = [json.loads(line)["choices"][0]["turns"] for line in answers.splitlines()]
    assert [len(own) for own in turns] == [2, 2]
    seconds = [prompt for prompt in server.prompts if "multi-turn" in prompt]
    assert len(seconds) == 2
    for own in turns:  # a judge of the second turn sees both
        assert any(all(text in prompt for text in own) for prompt in seconds)


def test_arena_hard(model: Path, tmp_path: Path) -> None:
    write_arena_hard(tmp_path / "files")
    with serving(lambda body: "My verdict: [[A>B]]") as server:
        results = evaluate(server, tmp_path, "arena_hard", *answering(model))
    assert "50.0" in json.dumps(results["models"]["model"]) and len(server.asked) == 4


def test_alpaca_eval(tmp_path: Path) -> None:
    write_alpaca_eval(tmp_path / "files")

    def answer(body: dict[str, Any]) -> Response:
        return told(0.75)  # the one shown first

    ready = f"+outputs.ready={tmp_path / 'files' / 'model_outputs.json'}"
    with serving(answer) as server:
        results = evaluate(server, tmp_path, "alpaca_eval", ready)
    assert len(server.asked) == 805
    rate = results["models"]["ready"]["win_rate_percent"]
    assert 45 < rate["value"] < 55 and rate["low"] < rate["value"] < rate["high"]
