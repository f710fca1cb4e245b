"""Ranks that wait for ever are ended: who is behind, where every rank was, and exit code 70."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_aligndistil.launch.failures import HUNG
from tests.integration.program import LIMIT_SECONDS, losses, start, write_model, write_pairs

MINUTES = 0.2
STUCK = """
import os, time
def stuck(prompts, responses):
    if os.environ["RANK"] == "0":
        time.sleep(3600)
    return [0.0] * len(responses)
"""


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("hang")
    return (
        f"model.restore_from_path={write_model(folder / 'model', seed=1)}",
        f"model.data.data_prefix.train=[{write_pairs(folder / 'pairs.jsonl', 40)}]",
        f"model.data.cache_dir={folder / 'cache'}",
        *("exp_manager.create_tensorboard_logger=false", "exp_manager.create_checkpoint_callback=false"),
        *("model.encoder_seq_length=192", "model.data.max_prompt_length=96", "model.micro_batch_size=2"),
        *("trainer.precision=32", "trainer.devices=2", f"trainer.timeout_minutes={MINUTES}"),
    )


def end_of(process, since: float) -> list[str]:
    """What the program says at its end, which must come soon after the limit."""
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    seconds = time.monotonic() - since
    assert process.returncode == HUNG, errors
    told = errors.splitlines()
    start = next(number for number, line in enumerate(told) if line.startswith("aligndistil: hung"))
    print(f"ended {seconds:.0f} s after it hung:", *told[start:], sep="\n")
    assert "Traceback" not in errors
    return told[start:]


def test_a_stopped_process_is_named(tmp_path: Path, common: tuple[str, ...]) -> None:
    process = start(
        *("train", "--config-name", "dpo", *common, f"exp_manager.explicit_log_dir={tmp_path}"),
        *("model.global_batch_size=8", "trainer.max_steps=100000", "trainer.max_epochs=100000"),
    )
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(losses(tmp_path)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}
    ranks[1].send_signal(signal.SIGSTOP)
    first, *others = end_of(process, time.monotonic())
    assert "rank 1 gave no answer: stopped, or on a machine that is away" in first
    assert f"longer than {60 * MINUTES:g} s (trainer.timeout_minutes)" in first
    assert len(others) == 1 and re.match(r"  rank 0: \w+ for \d+ s, at .*\.py:\d+ ", others[0])
    assert [path.name for path in (tmp_path / "hang").iterdir()] == ["rank_0.txt"]
    assert not ranks[1].is_running()


@pytest.mark.slow  # the watchdog itself is in the test above
def test_a_rank_that_is_behind_is_named(
    tmp_path: Path, common: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stuck_reward.py").write_text(STUCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    process = start(
        *("train", "--config-name", "ppo", *common, f"exp_manager.explicit_log_dir={tmp_path / 'run'}"),
        *("model.reward.source=function", "model.reward.function=stuck_reward:stuck"),
        *("model.encoder_seq_length=128", "model.rollout.max_new_tokens=8", "model.rollout.prompts_per_rollout=4"),
        *("model.global_batch_size=4", "trainer.max_steps=2"),
    )
    first, *others = end_of(process, began)
    assert "; the others wait for rank 0, in rollout/score; " in first
    assert others[0].startswith("  rank 0: rollout/score for ") and "stuck_reward.py:5 stuck of " in others[0]
    assert others[1].startswith("  rank 1: rollout/score for ") and "distributed_c10d.py" in others[1]
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "hang").iterdir()}
    assert sorted(stacks) == ["rank_0.txt", "rank_1.txt"]
    assert "time.sleep(3600)" in stacks["rank_0.txt"]
