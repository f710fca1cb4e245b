"""Which variants are trained, by which arguments, and which are kept."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_aligndistil.config.analysis_schema import ANALYSES
from megatron_aligndistil.config.compose import load_overrides
from megatron_aligndistil.errors import ConfigError, TrainingError
from megatron_aligndistil.launch import variants


class Trainings:
    """Stands for ``aligndistil train``: notes the arguments and answers with ``codes``, 0 after them."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.calls = list(codes), []

    def __call__(self, command: list[str], check: bool) -> SimpleNamespace:
        self.calls.append(command[3:])
        folder = next(part.partition("=")[2] for part in command if part.startswith("exp_manager.explicit_log_dir="))
        Path(folder).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(returncode=self.codes.pop(0) if self.codes else 0)


def config(folder: Path, *overrides: str) -> Any:
    (folder / "mine.yaml").write_text(
        "defaults: [extrapolation, _self_]\nanalysis:\n  constants: [1.0, 1.25]\n  training:\n    overrides:\n"
        + "".join(
            f"      - {line}\n"
            for line in (
                f"model.restore_from_path={folder}",
                f"model.aligndistil.dpo_path={folder}",
                f"model.aligndistil.reverse_dpo_path={folder}",
                f"model.data.data_prefix.train=[{folder}]",
                "model.aligndistil.alpha=30",
            )
        )
    )
    given = [f"output={folder / 'out'}", *overrides]
    return load_overrides(ANALYSES["extrapolation"], given, "extrapolation", ("mine", folder))


def train(own: Any, monkeypatch: pytest.MonkeyPatch, *codes: int, can_start: bool = True) -> list[list[str]]:
    trainings = Trainings(*codes)
    monkeypatch.setattr(subprocess, "run", trainings)
    variants.train_all(own, can_start)
    return trainings.calls


def test_each_variant_is_the_users_run_with_its_own_weight(tmp_path: Path) -> None:
    own = config(tmp_path)
    found = {variant.name: variants.training_of(own, variant) for variant in variants.variants_of(own)}
    weights = {name: (run.model.aligndistil.weight, run.model.aligndistil.alpha) for name, run in found.items()}
    assert weights == {
        "constant 1": ("constant", 1.0),
        "constant 1.25": ("constant", 1.25),
        "adaptive": ("adaptive", 30.0),
    }
    folders = {run.exp_manager.explicit_log_dir for run in found.values()}
    assert folders == {
        str(tmp_path / "out" / "variants" / name) for name in ("constant_1", "constant_1.25", "adaptive")
    }


def test_what_is_finished_is_kept_and_a_failure_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = config(tmp_path)
    with pytest.raises(TrainingError, match=r"constant 1\.25: its training ended with exit code 2"):
        train(own, monkeypatch, 0, 2)
    calls = train(own, monkeypatch)
    assert ["weight=constant" in " ".join(call) for call in calls] == [True, False]
    assert all("exp_manager.resume_if_exists=true" in call for call in calls)
    assert train(own, monkeypatch) == []
    more = train(config(tmp_path, "analysis.constants=[1.0,1.25,1.5]"), monkeypatch)
    assert len(more) == 1 and "model.aligndistil.alpha=1.5" in more[0]


def test_a_variant_of_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(tmp_path), monkeypatch)
    with pytest.raises(ConfigError, match="was trained by other settings"):
        train(config(tmp_path, "analysis.training.config_name=aligndistil_on_policy"), monkeypatch)


def test_under_a_launcher_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = config(tmp_path)
    with pytest.raises(ConfigError, match="a launcher has started this process"):
        train(own, monkeypatch, can_start=False)
    train(own, monkeypatch)
    assert train(own, monkeypatch, can_start=False) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("analysis.training.config_name=nothing", "no such config"),
        ("analysis.training.overrides=['model.aligndistil.alpha=-1']", "mandatory, but not set"),
    ],
)
def test_a_run_that_cannot_be_trained_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(config(tmp_path, override), monkeypatch)


def test_a_run_without_a_checkpoint_at_its_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = config(tmp_path)
    own.analysis.training.overrides.append("exp_manager.checkpoint_callback_params.save_on_train_end=false")
    with pytest.raises(ConfigError, match="must end with a checkpoint"):
        train(own, monkeypatch)
