"""Two nodes on one machine: a launcher each, which meet as torchrun's do."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_aligndistil.parallel.ports import free_port
from tests.integration.program import LIMIT_SECONDS, losses, run, start, write_model, write_pairs


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("nodes")
    return (
        *("train", "--config-name", "dpo"),
        f"model.restore_from_path={write_model(folder / 'model', seed=1)}",
        f"model.data.data_prefix.train=[{write_pairs(folder / 'pairs.jsonl', 40)}]",
        f"model.data.cache_dir={folder / 'cache'}",
        *("exp_manager.create_tensorboard_logger=false", "exp_manager.create_checkpoint_callback=false"),
        *("model.encoder_seq_length=192", "model.data.max_prompt_length=96"),
        *("model.global_batch_size=8", "model.micro_batch_size=2", "trainer.precision=32"),
    )


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], tmp_path: Path):
    """Starts both launchers with one rank each."""
    monkeypatch.setenv("PET_RDZV_ENDPOINT", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("PET_RDZV_ID", "test")
    started: list[subprocess.Popen[str]] = []

    def both(*overrides: str) -> list[subprocess.Popen[str]]:
        own = (f"exp_manager.explicit_log_dir={tmp_path / 'run'}", "trainer.num_nodes=2", "trainer.devices=1")
        started.extend(start(*arguments, *own, *overrides) for _ in range(2))
        return started

    yield both
    for process in started:
        process.kill()
        process.communicate()


def test_they_train_as_one(nodes, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for process in nodes("trainer.max_steps=4"):
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, errors
    monkeypatch.delenv("PET_RDZV_ENDPOINT")
    own = (f"exp_manager.explicit_log_dir={tmp_path / 'one'}", "trainer.devices=2", "trainer.max_steps=4")
    assert run(*arguments, *own).exit_code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "one") != {}


def test_a_rank_that_is_killed_ends_both_in_seconds(nodes, tmp_path: Path) -> None:
    processes = nodes("trainer.max_steps=100000", "trainer.max_epochs=100000")
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(losses(tmp_path / "run")) < 3:
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)
    ranks = {}
    for process in processes:
        (child,) = psutil.Process(process.pid).children()
        ranks[int(child.environ()["RANK"])] = (process, child)
    ranks[1][1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    told = {rank: process.communicate(timeout=60)[1].splitlines() for rank, (process, _) in ranks.items()}
    print(f"both had ended after {time.monotonic() - began:.1f} s")
    assert [ranks[rank][0].returncode for rank in (0, 1)] == [1, 1]
    ours = {rank: [line for line in lines if line.startswith("aligndistil: ")] for rank, lines in told.items()}
    assert ours[1] == ["aligndistil: rank 1 was ended by SIGKILL (memory ran out, or someone killed it)"]
    assert (
        len(ours[0]) == 1 and "a rank or the launcher of another node was lost; that node's log says why" in ours[0][0]
    ), told[0][-12:]
    assert "Traceback" not in "\n".join(told[0] + told[1])


@pytest.mark.slow
def test_the_node_whose_rank_failed_says_why(nodes, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the log folder should be")
    said = [process.communicate(timeout=LIMIT_SECONDS)[1] for process in nodes("trainer.max_steps=4")]
    lines = [line for text in said for line in text.splitlines() if line.startswith("aligndistil: ")]
    assert len(lines) == 2 and all("explicit_log_dir" in line and "cannot write there" in line for line in lines), lines
