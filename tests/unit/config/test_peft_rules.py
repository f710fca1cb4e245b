"""The rules on adapters, and what their target names stand for."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from megatron_aligndistil.config import checks, peft_rules
from megatron_aligndistil.config.compose import load_config
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.models.families.lora import PROJECTIONS

TUNING = "model.peft.lora_tuning"
EXPORT = "exp_manager.checkpoint_callback_params.export_peft_on_train_end"


def dpo(tmp_path, *overrides: str) -> RunConfig:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    given = [f"model.restore_from_path={tmp_path}", f"model.data.data_prefix.train=[{tmp_path}/pairs.jsonl]"]
    config = OmegaConf.structured(load_config("dpo", given))
    return OmegaConf.to_object(OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides))))


@pytest.mark.parametrize(
    ("override", "start", "also"),
    [
        ("model.peft.peft_scheme=ia3", "model.peft.peft_scheme=ia3: ", "lora"),
        (f"{TUNING}.target_modules=[]", f"{TUNING}.target_modules=[]: ", "attention_qkv"),
        (f"{TUNING}.target_modules=[lm_head]", f"{TUNING}.target_modules=['lm_head']: ", "mlp_fc1"),
        (f"{TUNING}.adapter_dim=0", f"{TUNING}.adapter_dim=0: ", "at least 1"),
        (f"{TUNING}.alpha=0", f"{TUNING}.alpha=0.0: ", "greater than 0"),
        ("model.peft.restore_from_path=.", "model.peft.restore_from_path=.: ", "peft_scheme=lora"),
        (f"{EXPORT}=true", f"{EXPORT}=true: ", "peft_scheme=lora"),
    ],
)
def test_bad_keys_get_one_line(tmp_path, override, start, also):
    with pytest.raises(ConfigError) as caught:
        checks.check(dpo(tmp_path, override))
    text = str(caught.value)
    assert text.startswith(start) and also in text and "\n" not in text


def test_adapters_are_accepted(tmp_path):
    checks.check(dpo(tmp_path, "model.peft.peft_scheme=lora", f"{EXPORT}=true", "model.peft.restore_from_path=."))


def test_targets_are_the_models_projections():
    assert peft_rules.LORA_TARGETS["all"] == tuple(PROJECTIONS)
    assert peft_rules.lora_targets(["mlp", "attention_qkv", "mlp_fc1"]) == ("attention_qkv", "mlp_fc1", "mlp_fc2")
