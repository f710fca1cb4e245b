"""LoRA runs from the command line: resumed to the bit, taken as teachers, exported, and sampled from."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from tests.integration.program import Finished, losses, records, run, run_and_kill, write_model, write_pairs

STEPS = 8
TP2 = ("trainer.devices=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
SHARDED_OPTIMIZER = (
    "trainer.devices=2",
    "trainer.precision=bf16-mixed",
    "model.optim.name=distributed_fused_adam",
)
CHECKPOINTS = "exp_manager.checkpoint_callback_params"
KEPT = ("model.optim.lr=2e-2", f"{CHECKPOINTS}.export_hf_on_train_end=true")


class Setting:
    """A model, data, and the command lines that train adapters on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model", seed=1)
        self.pairs = write_pairs(folder / "pairs.jsonl", 32)

    def run(self, recipe: str, log_dir: Path, *overrides: str) -> Finished:
        finished = run(*self.arguments(recipe, log_dir, *overrides))
        assert finished.exit_code == 0, finished.errors
        return finished

    def arguments(self, recipe: str, log_dir: Path, *overrides: str) -> tuple[str, ...]:
        return (
            *("train", "--config-name", recipe),
            f"model.restore_from_path={self.model}",
            f"model.data.data_prefix.train=[{self.pairs}]",
            f"model.data.cache_dir={self.folder / 'cache'}",
            f"exp_manager.explicit_log_dir={log_dir}",
            "exp_manager.create_tensorboard_logger=false",
            "model.peft.peft_scheme=lora",
            "model.peft.lora_tuning.adapter_dim=4",
            "model.encoder_seq_length=192",
            "model.data.max_prompt_length=96",
            "model.global_batch_size=8",
            "model.micro_batch_size=2",
            "model.optim.lr=5e-3",
            f"trainer.max_steps={STEPS}",
            "trainer.precision=32",
            *overrides,
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def teachers(setting: Setting) -> dict[str, Path]:
    """A DPO and a reverse DPO run of adapters, far enough from their base and each other to matter."""
    peft = f"{CHECKPOINTS}.export_peft_on_train_end=true"
    found = {name: setting.folder / name for name in ("dpo", "reverse_dpo")}
    for name, log_dir in found.items():
        setting.run(name, log_dir, *KEPT, peft)
    return found


@pytest.mark.parametrize(
    "layout",
    [TP2, pytest.param(SHARDED_OPTIMIZER, marks=pytest.mark.slow)],
    ids=["tp2-sp", "dp2-bf16-sharded-optimizer"],
)
def test_a_killed_run_of_adapters_resumes_to_the_bit(setting, layout):
    name = "-".join(layout)[:40].replace("=", "")
    whole, killed = setting.folder / f"whole-{name}", setting.folder / f"killed-{name}"
    every = f"{CHECKPOINTS}.every_n_train_steps=2"
    setting.run("dpo", whole, every, *layout)
    step = random.Random().randint(3, STEPS - 3)
    overrides = (every, "exp_manager.resume_if_exists=true", *layout)
    run_and_kill(killed, step, 0.0, *setting.arguments("dpo", killed, *overrides))
    finished = setting.run("dpo", killed, *overrides)
    assert "resumed from" in finished.errors
    expected = losses(whole)
    assert len(expected) == STEPS and expected[STEPS] < expected[1]
    assert losses(killed) == expected


def test_exports_agree_and_the_base_stays_as_it_was(setting, teachers):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(2, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(teachers["dpo"] / "huggingface", dtype=torch.float32).eval()
    with torch.no_grad():
        plain, whole = base(tokens).logits, merged(tokens).logits
        adapted = PeftModel.from_pretrained(base, teachers["dpo"] / "adapter").eval()(tokens).logits
    assert (whole - plain).abs().max() > 1e-2  # training has changed something
    assert (whole - adapted).abs().max() <= 1e-5
    weights = [load_file(folder / "model.safetensors") for folder in (setting.model, teachers["dpo"] / "huggingface")]
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert all(name.endswith("_proj.weight") for name in changed) and len(changed) == 2 * 7


def test_teachers_and_policy_are_adapters_over_one_base(setting, teachers):
    """Runs, PEFT folders and merged models are the same teachers; the first two share the policy's base."""
    forms = {
        "runs": teachers,
        "peft": {name: folder / "adapter" for name, folder in teachers.items()},
        "merged": {name: folder / "huggingface" for name, folder in teachers.items()},
    }
    found = {}
    for form, paths in forms.items():
        log_dir = setting.folder / f"aligndistil-{form}"
        overrides = [f"model.aligndistil.{name}_path={path}" for name, path in paths.items()]
        measured = "model.aligndistil.measure_initial_kl=true"
        finished = setting.run("aligndistil", log_dir, *overrides, measured, "trainer.max_steps=3", *TP2)
        shared = "in memory once, the policy's base with its adapters: "
        assert (f"{shared}dpo, reverse_dpo, initial" in finished.errors) == (form != "merged"), finished.errors
        assert f"{shared}initial" in finished.errors or form != "merged"
        found[form] = records(log_dir)
    assert found["runs"][0]["tvd"] > 1e-3
    for name in ("loss", "tvd", "kl_to_dpo", "grad_norm"):
        series = {form: [record[name] for record in own] for form, own in found.items()}
        assert series["peft"] == series["runs"]
        assert series["merged"] == pytest.approx(series["runs"], rel=1e-4)
    assert found["runs"][0]["kl_to_initial"] == pytest.approx(0.0, abs=1e-6)  # B starts at zero


def test_an_engine_samples_from_the_merged_weights(setting, teachers):
    log_dir = setting.folder / "on-policy"
    overrides = [f"model.aligndistil.{name}_path={path}" for name, path in teachers.items()]
    rollout = ("model.rollout.engine=hf", "model.rollout.max_new_tokens=12", "model.optim.lr=2e-2")
    setting.run("aligndistil_on_policy", log_dir, *overrides, *rollout, "trainer.max_steps=3")
    gaps = [record["rollout/logprob_gap"] for record in records(log_dir)]
    print("gaps", gaps)
    assert len(gaps) == 3 and max(gaps) < 1e-5


def test_an_adapter_is_gone_on_with_and_refused_over_another_base(setting, teachers):
    log_dir, adapter = setting.folder / "on", f"model.peft.restore_from_path={teachers['dpo'] / 'adapter'}"
    setting.run("dpo", log_dir, adapter, "trainer.max_steps=2", "model.optim.lr=0")
    reward = records(log_dir)[-1]["reward_margin"]
    assert abs(reward) > 1e-3  # against the base, which is the reference
    for change, message in (
        (f"model.restore_from_path={teachers['reverse_dpo'] / 'huggingface'}", "an adapter over"),
        ("model.peft.lora_tuning.adapter_dim=8", "asks for"),
        ("model.peft.peft_scheme=null", "has no effect without model.peft.peft_scheme=lora"),
    ):
        finished = run(*setting.arguments("dpo", setting.folder / "refused", adapter, change))
        assert finished.exit_code == 2 and message in finished.error_lines[-1], finished.errors
        assert not (setting.folder / "refused" / "checkpoints").exists()


@pytest.mark.slow
def test_ppo_trains_adapters_of_policy_and_critic_and_resumes(setting, teachers):
    constant = ("model.optim.sched.name=WarmupPolicy", "model.optim.sched.warmup_ratio=null")
    overrides = (
        *constant,
        *(key.replace("model.optim", "model.ppo.critic.optim") for key in constant),
        "model.ppo.critic.optim.lr=5e-3",
        "model.reward.source=contrastive",
        *(f"model.reward.{name}_path={path}" for name, path in teachers.items()),
        "model.rollout.engine=hf",
        "model.rollout.max_new_tokens=12",
        "model.rollout.prompts_per_rollout=16",
        "exp_manager.resume_if_exists=true",
    )
    whole, parts = setting.folder / "ppo-whole", setting.folder / "ppo-parts"
    setting.run("ppo", whole, *overrides, "trainer.max_steps=4")
    setting.run("ppo", parts, *overrides, "trainer.max_steps=2")
    finished = setting.run("ppo", parts, *overrides, "trainer.max_steps=4")
    assert "resumed from" in finished.errors
    expected, found = records(whole), records(parts)
    compared = {name for name in expected[0] if not re.search("second|gib|rollout/|epoch", name)}
    assert compared >= {"loss", "grad_norm", "critic_loss", "critic_grad_norm"}
    for name in compared:
        assert [record.get(name) for record in found] == [record.get(name) for record in expected], name
    assert expected[-1]["critic_loss"] != expected[0]["critic_loss"]
