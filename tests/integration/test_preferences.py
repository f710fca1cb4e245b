"""The preference recipes as a user runs them: they begin where their formulas say, and learn the preference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.integration.program import records, run, write_model, write_pairs

STEPS = 6
# The loss before the first step, where policy and reference are one: -log σ(0), and (1 / (2 β))².
FIRST_LOSS = {"cdpo": math.log(2), "tdpo1": math.log(2), "tdpo2": math.log(2), "ipo": 25.0, "simpo": None}


@pytest.mark.parametrize(
    "recipe", ["tdpo2", "simpo", "ipo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cdpo", "tdpo1"))]
)
def test_a_recipe_learns_to_prefer(recipe: str, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    told_apart = (
        {**row, "chosen": f"{row['chosen']} moon moon", "rejected": f"wind {row['rejected']}"} for row in rows
    )
    pairs.write_text("".join(json.dumps(row) + "\n" for row in told_apart))
    finished = run(
        *("train", "--config-name", recipe),
        f"model.restore_from_path={write_model(tmp_path / 'model', seed=1)}",
        f"model.data.data_prefix.train=[{pairs}]",
        f"model.data.cache_dir={tmp_path / 'cache'}",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "exp_manager.create_checkpoint_callback=false",
        "model.encoder_seq_length=128",
        "model.data.max_prompt_length=96",
        "model.global_batch_size=8",
        "model.micro_batch_size=2",
        "model.optim.lr=1e-2",
        "model.optim.sched.warmup_ratio=0.0",
        f"trainer.max_steps={STEPS}",
        "trainer.max_epochs=2",
        "trainer.precision=32",
    )
    assert finished.exit_code == 0, finished.errors
    first, *_, last = records(tmp_path / "run")
    if FIRST_LOSS[recipe] is not None:
        assert first["loss"] == pytest.approx(FIRST_LOSS[recipe], rel=1e-5)
        assert first["reward_margin"] == pytest.approx(0.0, abs=1e-4)
    assert last["loss"] < first["loss"]
    assert last["reward_margin"] > first["reward_margin"]
    assert last["reward_margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], rel=1e-4, abs=1e-5)
    assert 0.5 < last["reward_accuracy"] <= 1
    for name in ("chosen_kl", "rejected_kl"):
        assert (name in last) == recipe.startswith("tdpo")
    if recipe.startswith("tdpo"):
        assert first["chosen_kl"] == pytest.approx(0.0, abs=1e-4)
        assert last["chosen_kl"] > 0.01 and last["rejected_kl"] > 0.01
