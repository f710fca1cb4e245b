"""``exp_manager``'s keys do what they say, in runs of the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.program import records, run, write_model, write_pairs


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [
        *("train", "--config-name", "dpo", f"model.restore_from_path={folder / 'model'}"),
        f"model.data.data_prefix.train=[{folder / 'pairs.jsonl'}]",
        f"model.data.cache_dir={folder / 'cache'}",
        *("model.encoder_seq_length=192", "model.data.max_prompt_length=96", "model.global_batch_size=2"),
        *("trainer.precision=32", "trainer.max_steps=7", *overrides),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exp-manager")
    write_model(folder / "model", seed=1)
    write_pairs(folder / "pairs.jsonl", 16)
    return folder


def test_folders_loggers_and_checkpoints(folder):
    params = "exp_manager.checkpoint_callback_params"
    finished = run(
        *arguments(
            folder,
            *(f"exp_manager.exp_dir={folder / 'results'}", "exp_manager.name=mine", "exp_manager.version=v2"),
            "exp_manager.create_tensorboard_logger=false",
            *(f"{params}.every_n_train_steps=2", f"{params}.save_top_k=2", f"{params}.save_on_train_end=false"),
            f"{params}.async_save=false",
        )
    )
    assert finished.exit_code == 0, finished.errors
    log_dir = folder / "results" / "mine" / "v2"
    assert len(records(log_dir)) == 7
    # Saved after steps 2, 4 and 6, not at the end; the newest two are kept.
    assert sorted(path.name[-1] for path in (log_dir / "checkpoints").glob("step_*")) == ["4", "6"]
    assert not list(log_dir.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("mode", ["min", pytest.param("max", marks=pytest.mark.slow)])
def test_the_best_checkpoints_by_a_metric_are_kept(folder, mode):
    params, log_dir = "exp_manager.checkpoint_callback_params", folder / mode
    finished = run(
        *arguments(
            folder,
            *(
                f"exp_manager.explicit_log_dir={log_dir}",
                f"model.data.data_prefix.validation=[{folder / 'pairs.jsonl'}]",
            ),
            *("trainer.val_check_interval=1", "model.optim.lr=1e-1", "exp_manager.create_tensorboard_logger=false"),
            *(f"{params}.every_n_train_steps=1", f"{params}.save_top_k=2", f"{params}.monitor=loss"),
            f"{params}.mode={mode}",
        )
    )
    assert finished.exit_code == 0, finished.errors
    found = {record["step"]: record["loss"] for record in records(log_dir, "validation")}
    best = sorted(found, key=found.__getitem__, reverse=mode == "max")[:2]
    kept = {int(path.name[5:]) for path in (log_dir / "checkpoints").glob("step_*")}
    assert len(found) == 7 and kept == {*best, 7}


def test_without_checkpoints_and_with_tensorboard(folder):
    log_dir = folder / "bare"
    given = [f"exp_manager.explicit_log_dir={log_dir}", "exp_manager.create_checkpoint_callback=false"]
    # A first run, told to resume: it may start from the beginning, which is what resume_ignore_no_checkpoint=true says.
    finished = run(*arguments(folder, *given, "exp_manager.resume_if_exists=true", "trainer.max_steps=1"))
    assert finished.exit_code == 0, finished.errors
    assert not (log_dir / "checkpoints").exists()
    assert list(log_dir.rglob("events.out.tfevents*"))


def test_a_run_that_must_resume_does_not_start_afresh(folder):
    log_dir = folder / "empty"
    finished = run(
        *arguments(
            folder,
            *(f"exp_manager.explicit_log_dir={log_dir}", "exp_manager.resume_if_exists=true"),
            "exp_manager.resume_ignore_no_checkpoint=false",
        )
    )
    assert finished.exit_code == 2
    (line,) = finished.error_lines
    assert "holds no complete checkpoint; set exp_manager.resume_ignore_no_checkpoint=true" in line
    assert not (log_dir / "metrics.jsonl").exists()
