"""What a user can get wrong: exit code 2, one line that names the place and the remedy, nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest

from tests.integration.program import Finished, records, run, write_model, write_pairs


class Setting:
    """A sound model, data and a finished run, to be spoiled one thing at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model", seed=1)
        self.pairs = write_pairs(folder / "pairs.jsonl", 16)
        self.finished = folder / "finished"
        assert self.train("dpo", self.finished).exit_code == 0

    def train(self, recipe: str, log_dir: Path, *overrides: str, file_limit: int | None = None) -> Finished:
        """Two steps on one rank; with ``file_limit`` no file can grow beyond so many bytes."""
        common = {
            "model.restore_from_path": self.model,
            "model.data.data_prefix.train": f"[{self.pairs}]",
            "model.data.cache_dir": self.folder / "cache",
            "exp_manager.explicit_log_dir": log_dir,
            "exp_manager.checkpoint_callback_params.async_save": "false",
            "model.encoder_seq_length": 192,
            "model.data.max_prompt_length": 96,
            "model.global_batch_size": 4,
            "trainer.precision": "32",
            "trainer.max_steps": 2,
        }
        arguments = ["train", "--config-name", recipe, *(f"{key}={value}" for key, value in common.items()), *overrides]
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, limits[1]))
        try:
            return run(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("bad-input"))


def assert_one_line(finished: Finished, *parts: str) -> None:
    assert finished.exit_code == 2, finished.errors
    assert "Traceback" not in finished.errors
    (line,) = finished.error_lines
    for part in parts:
        assert part in line


def spoiled(setting: Setting, tmp_path: Path, text: str) -> Path:
    """The good pairs with ``text`` as their third row."""
    lines = setting.pairs.read_text().splitlines()
    path = tmp_path / "spoiled.jsonl"
    path.write_text("\n".join([*lines[:2], text, *lines[2:]]) + "\n")
    return path


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ('{"prompt": "red", "chosen": ', ["spoiled.jsonl:3"]),
        (json.dumps({"prompt": "red", "chosen": "", "rejected": "blue"}), ["spoiled.jsonl:3", "chosen"]),
        (json.dumps({"prompt": "red", "rejected": "blue"}), ["spoiled.jsonl:3", "chosen"]),
    ],
    ids=["malformed", "empty-response", "missing-field"],
)
def test_a_bad_row_is_named_by_file_and_row(setting: Setting, tmp_path: Path, row: str, parts: list[str]) -> None:
    log_dir, path = tmp_path / "run", spoiled(setting, tmp_path, row)
    finished = setting.train("dpo", log_dir, f"model.data.data_prefix.train=[{path}]")
    assert_one_line(finished, *parts)
    assert not log_dir.exists()


def test_prompts_beyond_the_limit_leave_zero_rows(setting: Setting, tmp_path: Path) -> None:
    finished = setting.train("dpo", tmp_path / "run", "model.data.max_prompt_length=1")
    assert_one_line(finished, "no example is left of 16 rows", "prompt")


def test_a_teacher_with_another_tokenizer_is_refused(setting: Setting, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=2, words=["quartz", "zephyr", "wolfram", "junk"])
    paths = (f"model.aligndistil.dpo_path={setting.finished}", f"model.aligndistil.reverse_dpo_path={other}")
    finished = setting.train("aligndistil", tmp_path / "run", *paths)
    assert_one_line(finished, "model.aligndistil.reverse_dpo_path", str(other), "tokenizer")


def test_a_missing_model_is_named(setting: Setting, tmp_path: Path) -> None:
    finished = setting.train("dpo", tmp_path / "run", "model.restore_from_path=/no/such/model")
    assert_one_line(finished, "model.restore_from_path", "/no/such/model")


def test_a_truncated_checkpoint_file_is_named(setting: Setting, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(setting.finished, damaged)
    largest = max(damaged.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1000])
    finished = setting.train("dpo", tmp_path / "run", f"model.restore_from_path={damaged}")
    assert_one_line(finished, largest.name)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["trainer.devices=3", "model.tensor_model_parallel_size=3"], ["tensor_model_parallel_size"]),
        (["trainer.devices=3", "model.pipeline_model_parallel_size=3"], ["pipeline_model_parallel_size"]),
        (["trainer.devices=3", "model.tensor_model_parallel_size=2"], ["trainer.devices"]),
        (["model.context_parallel_size=2", "trainer.devices=2"], ["context_parallel_size"]),
        (["model.global_batch_size=20"], ["model.global_batch_size=20", "16 examples"]),
    ],
    ids=["heads", "layers", "world", "context-parallel", "batch"],
)
def test_a_layout_that_does_not_fit_is_refused(
    setting: Setting, tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    assert_one_line(setting.train("dpo", tmp_path / "run", *overrides), *parts)


def test_a_finished_run_is_not_overwritten(setting: Setting) -> None:
    before = sorted(setting.finished.rglob("*"))
    assert_one_line(setting.train("dpo", setting.finished), "exp_manager.resume_if_exists=true")
    assert sorted(setting.finished.rglob("*")) == before


def test_resuming_on_other_data_is_refused(setting: Setting, tmp_path: Path) -> None:
    log_dir = tmp_path / "run"
    shutil.copytree(setting.finished, log_dir)
    pairs = write_pairs(tmp_path / "other.jsonl", 16, seed=1)
    overrides = ("exp_manager.resume_if_exists=true", f"model.data.data_prefix.train=[{pairs}]", "trainer.max_steps=4")
    assert_one_line(setting.train("dpo", log_dir, *overrides), "train_fingerprint")


@pytest.mark.parametrize(
    "in_background", [pytest.param(False, marks=pytest.mark.slow), True], ids=["foreground", "background"]
)
def test_a_full_disk_while_saving_leaves_the_last_good_checkpoint(
    setting: Setting, tmp_path: Path, in_background: bool
) -> None:
    log_dir = tmp_path / "run"
    shutil.copytree(setting.finished, log_dir)
    overrides = (
        "exp_manager.resume_if_exists=true",
        "trainer.max_steps=4",
        f"exp_manager.checkpoint_callback_params.async_save={str(in_background).lower()}",
    )
    finished = setting.train("dpo", log_dir, *overrides, file_limit=50_000)
    assert_one_line(finished, "cannot write the checkpoint", "File too large")
    assert [path.name for path in (log_dir / "checkpoints").glob("step_*")] == ["step_00000002"]
    resumed = setting.train("dpo", log_dir, *overrides)
    assert resumed.exit_code == 0, resumed.errors
    assert "after step 2" in resumed.errors
    assert [record["step"] for record in records(log_dir)] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(setting: Setting, tmp_path: Path) -> None:
    log_dir = tmp_path / "run"
    finished = setting.train("dpo", log_dir, "model.optim.lr=1e30", "trainer.max_steps=4")
    assert_one_line(
        finished, "not finite" if "not finite" in finished.errors else " is nan", str(log_dir / "nonfinite")
    )
    (report,) = (log_dir / "nonfinite").glob("step_*_data_rank_0.json")
    origins = [o for batch in json.loads(report.read_text())["micro_batches"] for o in batch["origins"]]
    assert len(origins) == 4
    assert all(origin.startswith(str(setting.pairs)) for origin in origins)
    assert not (log_dir / "checkpoints").exists() or not list((log_dir / "checkpoints").glob("step_*"))
