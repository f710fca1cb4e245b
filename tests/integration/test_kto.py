"""KTO trains a tiny model on pairs and labelled responses, under any layout alike, and resumes to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.program import losses, records, run, write_model, write_pairs

STEPS = 8


class Setting:
    """A model, 9 desirable and 8 undesirable responses, and a run that has trained on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.data = write_model(folder / "model", seed=1), write_pairs(folder / "data.jsonl", 6)
        labelled = [{"prompt": f"stone {i}", "completion": "red moon", "label": i % 2 == 0} for i in range(5)]
        with self.data.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in labelled)
        self.whole = folder / "whole"
        finished = run(*self.arguments(self.whole))
        assert finished.exit_code == 0, finished.errors

    def arguments(self, log_dir: Path, *more: str) -> tuple[str, ...]:
        return (
            *("train", "--config-name", "kto"),
            f"model.restore_from_path={self.model}",
            f"model.data.data_prefix.train=[{self.data}]",
            f"model.data.data_prefix.validation=[{self.data}]",  # its last batch is one response alone
            f"model.data.cache_dir={self.folder / 'cache'}",
            f"exp_manager.explicit_log_dir={log_dir}",
            "exp_manager.resume_if_exists=true",
            f"exp_manager.checkpoint_callback_params.every_n_train_steps={STEPS // 2}",
            "model.encoder_seq_length=128",
            "model.data.max_prompt_length=64",
            "model.global_batch_size=8",
            "model.micro_batch_size=2",
            "model.optim.lr=3e-3",
            "model.optim.sched.warmup_ratio=null",
            "model.kto.beta=0.5",
            "model.kto.undesirable_weight=1.5",
            f"trainer.max_steps={STEPS}",
            "trainer.val_before_training=true",
            "trainer.precision=64",
            "trainer.gradient_clip_val=0",  # Megatron-Core clips fp32 gradients only
            *more,
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("kto"))


def test_the_loss_falls(setting: Setting) -> None:
    before, after = records(setting.whole, "validation")
    # At log-ratios of 0 a response costs half its weight.
    assert abs(before["loss"] - (9 * 0.5 + 8 * 0.75) / 17) < 1e-12
    assert (before["z0"], before["kl_estimate"]) == (0, 0)
    print(f"loss {before['loss']:.3f} before, {after['loss']:.3f} after")
    assert after["loss"] < 0.9 * before["loss"]
    assert after["desirable_reward"] > after["undesirable_reward"]
    steps = records(setting.whole)
    assert all(step["estimate_seconds"] > 0 for step in steps)
    assert all(step["z0"] == pytest.approx(max(0, 0.5 * step["kl_estimate"]), abs=1e-12) for step in steps)
    assert len({step["kl_estimate"] for step in steps}) == STEPS  # of each step's weights


def test_a_run_goes_on_from_a_checkpoint_to_the_bit(setting: Setting) -> None:
    half = setting.folder / "half"
    shutil.copytree(setting.whole, half)
    shutil.rmtree(max((half / "checkpoints").glob("step_*")))
    again = run(*setting.arguments(half))
    assert again.exit_code == 0 and f"after step {STEPS // 2}" in again.errors, again.errors
    assert losses(half) == losses(setting.whole)
    kls = [[step["kl_estimate"] for step in records(folder)] for folder in (half, setting.whole)]
    assert kls[0] == kls[1]
    assert records(half, "validation")[-1]["loss"] == records(setting.whole, "validation")[-1]["loss"]


def test_replicas_and_packing_train_alike(setting: Setting) -> None:
    other = setting.folder / "other"
    layout = ("trainer.devices=2", "model.micro_batch_size=1", "model.data.batching=packed")
    finished = run(*setting.arguments(other, *layout))
    assert finished.exit_code == 0, finished.errors
    for phase, count in (("train", STEPS), ("validation", 2)):
        theirs, ours = records(other, phase), records(setting.whole, phase)
        assert len(theirs) == len(ours) == count
        for one, another in zip(theirs, ours, strict=True):
            for metric in ("loss", "kl_estimate", "desirable_reward", "undesirable_reward"):
                assert abs(one[metric] - another[metric]) <= 1e-8, metric
