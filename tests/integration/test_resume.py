"""A run that is killed goes on to the bit; under another layout it goes on within rounding."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from tests.integration.program import Finished, losses, records, run, run_and_kill, write_model, write_pairs

STEPS = 14


class Setting:
    """A model, data, and the command lines that train on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model", seed=1)
        self.pairs = write_pairs(folder / "pairs.jsonl", 40)

    def arguments(self, log_dir: Path, *overrides: str) -> tuple[str, ...]:
        return (
            *("train", "--config-name", "dpo"),
            f"model.restore_from_path={self.model}",
            f"model.data.data_prefix.train=[{self.pairs}]",
            f"model.data.data_prefix.validation=[{self.pairs}]",
            f"model.data.cache_dir={self.folder / 'cache'}",
            f"exp_manager.explicit_log_dir={log_dir}",
            "exp_manager.resume_if_exists=true",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
            "model.encoder_seq_length=192",
            "model.data.max_prompt_length=96",
            "model.global_batch_size=8",
            "model.micro_batch_size=2",
            "model.optim.lr=1e-3",
            f"trainer.max_steps={STEPS}",
            "trainer.precision=32",
            *overrides,
        )


TWO_STAGES = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")
BF16_SHARDED_OPTIMIZER = (
    "trainer.devices=2",
    "trainer.precision=bf16-mixed",
    "model.optim.name=distributed_fused_adam",
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("resume"))


def resumed_after(finished: Finished) -> int:
    """The step from which a run that must have ended well says that it went on."""
    assert finished.exit_code == 0, finished.errors
    found = re.search(r"resumed from \S+ after step (\d+)", finished.errors)
    assert found is not None, finished.errors
    return int(found[1])


LAYOUTS = {"pp2": TWO_STAGES, "dp2-bf16-sharded-optimizer": BF16_SHARDED_OPTIMIZER}


@pytest.mark.parametrize("name", [pytest.param("pp2", marks=pytest.mark.slow), "dp2-bf16-sharded-optimizer"])
def test_a_run_killed_at_a_random_step_resumes_to_the_bit(setting: Setting, name: str) -> None:
    layout, whole, killed = LAYOUTS[name], setting.folder / f"whole-{name}", setting.folder / f"killed-{name}"
    finished = run(*setting.arguments(whole, *layout))
    assert finished.exit_code == 0, finished.errors
    expected = losses(whole)
    assert sorted(expected) == list(range(1, STEPS + 1))

    rng = random.Random()
    step, delay = rng.randint(3, STEPS - 5), rng.uniform(0.0, 0.03)
    run_and_kill(killed, step, delay, *setting.arguments(killed, *layout))
    after = resumed_after(run(*setting.arguments(killed, *layout)))
    print(f"{name}: killed {delay:.3f} s after step {step} was logged, resumed after step {after}")
    assert 0 < after < STEPS
    assert losses(killed) == expected
    assert records(killed, "validation")[-1]["loss"] == records(whole, "validation")[-1]["loss"]


def test_a_checkpoint_resumes_under_other_layouts_within_rounding(setting: Setting) -> None:
    # A constant rate: the schedule of the first half must not know where it ends.
    constant = ("model.optim.sched.name=WarmupPolicy", "model.optim.sched.warmup_ratio=null")
    whole, half = setting.folder / "whole-1", setting.folder / "half"
    assert run(*setting.arguments(whole, *constant)).exit_code == 0
    expected = losses(whole)
    assert run(*setting.arguments(half, *constant, f"trainer.max_steps={STEPS // 2}")).exit_code == 0
    layouts = {
        "tp2": ("trainer.devices=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
        "pp2": TWO_STAGES,
        "dp2": ("trainer.devices=2",),
    }
    for name, layout in layouts.items():
        copy = setting.folder / f"half-{name}"
        shutil.copytree(half, copy)
        assert resumed_after(run(*setting.arguments(copy, *constant, *layout))) == STEPS // 2
        resumed = losses(copy)
        assert resumed.keys() == expected.keys()
        differences = [abs(resumed[step] - loss) / abs(loss) for step, loss in expected.items()]
        print(f"{name}: largest relative difference {max(differences):.1e}")
        assert max(differences) <= 1e-5
