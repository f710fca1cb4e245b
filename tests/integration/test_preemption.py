"""A run that is asked to stop finishes its step, saves, says so, and goes on to the bit."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_aligndistil.launch.failures import PREEMPTED
from tests.faults.table import record
from tests.integration.program import LIMIT_SECONDS, losses, run, start, write_model, write_pairs

STEPS = 40


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("preemption")
    return (
        *("train", "--config-name", "dpo"),
        f"model.restore_from_path={write_model(folder / 'model', seed=1)}",
        f"model.data.data_prefix.train=[{write_pairs(folder / 'pairs.jsonl', 40)}]",
        f"model.data.cache_dir={folder / 'cache'}",
        *("exp_manager.resume_if_exists=true", "exp_manager.create_tensorboard_logger=false"),
        *("model.encoder_seq_length=192", "model.data.max_prompt_length=96"),
        *("model.global_batch_size=8", "model.micro_batch_size=2", "model.optim.lr=1e-3"),
        *(f"trainer.max_steps={STEPS}", "trainer.precision=32", "trainer.devices=2"),
    )


@pytest.fixture(scope="module")
def expected(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    whole = tmp_path_factory.mktemp("whole")
    finished = run(*arguments, f"exp_manager.explicit_log_dir={whole}")
    assert finished.exit_code == 0, finished.errors
    return losses(whole)


@pytest.mark.parametrize("name", [pytest.param("SIGUSR1 once", marks=pytest.mark.slow), "SIGTERM storm"])
def test_a_signal_ends_a_run_between_two_steps(
    name: str, tmp_path: Path, arguments: tuple[str, ...], expected: dict[int, float]
) -> None:
    here = (*arguments, f"exp_manager.explicit_log_dir={tmp_path}")
    process = start(*here)
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and len(losses(tmp_path)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if name == "SIGUSR1 once":
        process.send_signal(signal.SIGUSR1)
    while name == "SIGTERM storm" and process.poll() is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid)
            for member in (family, *family.children(recursive=True)):  # ranks, and what writes for them
                member.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == PREEMPTED, errors
    fault, name = name, name.partition(" ")[0]
    ours = [line for line in errors.splitlines() if line.startswith("aligndistil: ")]
    done = max(losses(tmp_path))
    assert 3 <= done < STEPS
    assert ours == [
        f"aligndistil: stopped by {name} after step {done} of {STEPS}; the same command goes on from the "
        "newest checkpoint with exp_manager.resume_if_exists=true"
    ]
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == [f"step_{done:08d}"]
    finished = run(*here)
    assert finished.exit_code == 0, finished.errors
    assert f"after step {done}" in finished.errors
    record(f"{fault} to stop", 1, 1, int(losses(tmp_path) == expected))
