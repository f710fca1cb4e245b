"""On-policy AlignDistil whose responses a real vLLM server draws; the server is killed in the middle of a rollout."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.faults.table import record
from tests.integration.program import environment, records, write_pairs
from tests.integration.test_vllm import INTERPRETER, a_model, pytestmark

__all__ = ["pytestmark"]

STEPS, RESPONSES = 4, 16
LIMIT_SECONDS = 600


def a_variant(folder: Path, model: Path, seed: int) -> Path:
    """``model`` with other weights."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    varied = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in varied.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    varied.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("vllm-training")
    model = a_model(folder / "model")
    pairs = write_pairs(folder / "pairs.jsonl", 64)
    return (
        *("train", "--config-name", "aligndistil_on_policy"),
        f"model.restore_from_path={model}",
        f"model.aligndistil.dpo_path={a_variant(folder / 'dpo', model, 1)}",
        f"model.aligndistil.reverse_dpo_path={a_variant(folder / 'reverse', model, 2)}",
        f"model.data.data_prefix.train=[{pairs}]",
        f"model.data.cache_dir={folder / 'cache'}",
        "model.encoder_seq_length=128",
        "model.data.max_prompt_length=48",
        "model.rollout.max_new_tokens=80",
        "model.rollout.engine=vllm",
        f"model.rollout.vllm.python={INTERPRETER}",
        "model.rollout.vllm.dtype=float32",
        "model.rollout.vllm.kv_cache_gib=0.25",
        "model.rollout.max_logprob_gap=1e-4",
        "model.rollout.sync_bucket_mib=1",
        f"model.global_batch_size={RESPONSES}",
        "model.micro_batch_size=4",
        "model.optim.lr=1e-3",
        f"trainer.max_steps={STEPS}",
        "trainer.precision=32",
        # Two ranks share one server: rank 0 speaks to it, both get weights, responses and restarts.
        "trainer.devices=2",
        "model.pipeline_model_parallel_size=1",
    )


def train(arguments: tuple[str, ...], log_dir: Path, kill_after_syncs: int | None = None) -> str:
    """What the run printed. The engine is killed while it draws responses after so many syncs' log lines."""
    command = [sys.executable, "-m", "megatron_aligndistil", *arguments, f"exp_manager.explicit_log_dir={log_dir}"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    watchdog = threading.Timer(LIMIT_SECONDS, process.kill)
    watchdog.start()
    assert process.stderr is not None
    lines, synced = [], 0
    for line in process.stderr:
        lines.append(line)
        synced += "weights to the engines: " in line
        if "weights to the engines: " in line and synced == kill_after_syncs:
            time.sleep(0.5)  # the comparison of log-probs takes a tenth of that, the responses several seconds
            for engine in psutil.Process(process.pid).children(recursive=True):
                if "EngineCore" in engine.name() or "EngineCore" in " ".join(engine.cmdline()):
                    engine.send_signal(signal.SIGKILL)
    watchdog.cancel()
    printed = "".join(lines)
    assert process.wait() == 0, printed
    return printed


def test_a_killed_engine_costs_nothing_but_time(arguments: tuple[str, ...], tmp_path: Path) -> None:
    train(arguments, tmp_path / "whole")
    printed = train(arguments, tmp_path / "killed", kill_after_syncs=2)
    assert "an engine was lost" in printed
    whole, killed = records(tmp_path / "whole"), records(tmp_path / "killed")
    assert [step["step"] for step in killed] == list(range(1, STEPS + 1))
    restarts = [step["rollout/restarts"] for step in killed]
    assert restarts == sorted(restarts)
    assert restarts[-1] == 1
    weights = [step["rollout/sync_mib"] for step in killed]
    again = restarts.index(1)  # where the new engine got its weights
    assert weights[again] == pytest.approx(2 * whole[again]["rollout/sync_mib"])
    assert sum(weights) == pytest.approx(sum(step["rollout/sync_mib"] for step in whole) + weights[again] / 2)
    for before, after in zip(whole, killed, strict=True):
        print(
            f"step {before['step']}: loss {before['loss']!r} and {after['loss']!r}, "
            f"gap {after['rollout/logprob_gap']:.1e}"
        )
        assert after["rollout/responses"] == RESPONSES
        # Every response that was drawn is trained on, once.
        assert after["response_tokens"] == round(after["rollout/response_tokens"] * RESPONSES)
        assert after["rollout/logprob_gap"] < 1e-4
        assert after["response_tokens"] == before["response_tokens"]
        assert after["loss"] == before["loss"]
    record("vLLM engine killed", 1, 1, 1)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
