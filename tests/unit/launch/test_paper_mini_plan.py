"""The miniature's runs: what they need, and that the commands come to checked configurations of the stated settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.config import checks, compose
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch.paper_mini import BATCH, ROLLOUT_STEPS
from megatron_aligndistil.launch.paper_mini_plan import (
    CONFIGS,
    METHODS,
    STAGES,
    Layout,
    Run,
    base_run,
    needed_beside_sft,
    stage_run,
    with_needs,
)
from megatron_aligndistil.launch.paper_mini_task import MAX_NEW_TOKENS
from megatron_aligndistil.report.paper_mini import TABLE_4

SEED = 7


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Every model and file that a run takes is there, empty: the checks want to see them."""
    made = Layout(tmp_path)
    for folder in (made.random, *(made.model(name, SEED) for name in ("base", *STAGES))):
        folder.mkdir(parents=True)
    for file in (made.reading, made.data("demonstrations", SEED), made.data("pairs", SEED)):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    return made


def composed(run: Run) -> RunConfig:
    train, _, folder, _, name, *overrides = run.arguments
    assert train == "train" and Path(folder) == CONFIGS
    config = compose.load_config(name, overrides, folder)
    checks.check(config)
    return config


def model_of(layout: Layout, name: str) -> Any:
    return composed(stage_run(layout, name, SEED)).model


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_a_checked_run_of_the_same_size_and_rate(layout: Layout, name: str) -> None:
    run = stage_run(layout, name, SEED)
    config = composed(run)
    start = "base" if name == "sft" else "sft"
    assert config.model.restore_from_path == str(layout.model(start, SEED))
    assert config.exp_manager.explicit_log_dir == str(run.folder) == str(layout.root / name / "seed_7")
    assert config.exp_manager.checkpoint_callback_params.export_hf_on_train_end
    assert (config.model.seed, config.trainer.max_epochs, config.model.optim.lr) == (SEED, 1, 3e-4)
    sequences_a_row = 2 if name == "kto" else 1
    assert config.model.global_batch_size == BATCH * sequences_a_row
    assert config.trainer.devices == 1


def test_the_base_model_starts_from_random_weights(layout: Layout) -> None:
    config = composed(base_run(layout))
    assert config.model.restore_from_path == str(layout.random)
    assert config.model.data.data_prefix.train == [str(layout.reading)]
    assert config.model.global_batch_size == BATCH


def test_models_of_others_are_those_of_the_same_seed(layout: Layout) -> None:
    assert model_of(layout, "ppo").reward.path == str(layout.model("reward_model", SEED))
    assert model_of(layout, "rto").rto.dpo_path == str(layout.model("dpo", SEED))
    for name in ("aligndistil", "aligndistil_on_policy"):
        settings = model_of(layout, name).aligndistil
        assert settings.dpo_path == str(layout.model("dpo", SEED))
        assert settings.reverse_dpo_path == str(layout.model("reverse_dpo", SEED))


def test_coefficients_are_the_published_ones(layout: Layout) -> None:
    """TL;DR's where the paper has them; the authors' alphas 1 and 2 with a TVD of half the range."""
    assert [model_of(layout, name).dpo.beta for name in ("dpo", "reverse_dpo", "dpo_001")] == [0.1, 0.1, 0.01]
    off, on = model_of(layout, "aligndistil").aligndistil, model_of(layout, "aligndistil_on_policy").aligndistil
    assert (off.alpha / 2, off.tvd_scale, off.source) == (1.0, 1.0, "dataset")
    assert (on.alpha / 2, on.tvd_scale, on.source) == (2.0, 1.0, "rollout")
    assert [model_of(layout, name).ppo.kl_coef for name in ("ppo", "rto")] == [0.07, 0.07]
    assert model_of(layout, "rto").rto.beta1 == 0.1
    for name in ("ppo", "rto"):
        model = model_of(layout, name)
        assert model.ppo.critic.optim.lr == pytest.approx(9 * model.optim.lr)
        assert model.rollout.prompts_per_rollout == ROLLOUT_STEPS * BATCH


def test_training_draws_answers_as_long_as_the_evaluation_does(layout: Layout) -> None:
    for name in ("ppo", "rto", "aligndistil_on_policy"):
        assert model_of(layout, name).rollout.max_new_tokens == MAX_NEW_TOKENS


def test_methods_bring_what_they_need_in_an_order_to_train_in() -> None:
    assert with_needs(["rto"]) == ["sft", "reward_model", "dpo", "rto"]
    assert with_needs(["aligndistil", "sft"]) == ["sft", "dpo", "reverse_dpo", "aligndistil"]
    assert needed_beside_sft("aligndistil") == ["dpo", "reverse_dpo"]
    assert needed_beside_sft("sft") == []
    ordered = with_needs(METHODS)
    for name in ordered:
        assert all(need == "base" or ordered.index(need) < ordered.index(name) for need in STAGES[name].needs)


def test_a_method_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="--methods grpo: no such method; choose from sft, dpo"):
        with_needs(["grpo"])


def test_every_published_method_has_a_row() -> None:
    assert TABLE_4.keys() <= set(METHODS)
