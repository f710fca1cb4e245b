"""Rules for ``model.peft``, and what its target names stand for."""

from __future__ import annotations

from megatron_aligndistil.config.schema import RunConfig

# NeMo's names of projections, and of groups of them.
_ATTENTION, _MLP = ("attention_qkv", "attention_dense"), ("mlp_fc1", "mlp_fc2")
LORA_TARGETS = {
    **{name: (name,) for name in (*_ATTENTION, *_MLP)},
    "attention": _ATTENTION,
    "mlp": _MLP,
    "all": _ATTENTION + _MLP,
}


def lora_targets(names: list[str]) -> tuple[str, ...]:
    """The projections that ``names`` stand for, each once, in the order of a layer."""
    asked = {target for name in names for target in LORA_TARGETS[name]}
    return tuple(target for target in LORA_TARGETS["all"] if target in asked)


def lora_targets_are_known(config: RunConfig) -> str | None:
    targets = config.model.peft.lora_tuning.target_modules
    if not targets or any(name not in LORA_TARGETS for name in targets):
        return f"model.peft.lora_tuning.target_modules={targets}: choose from {', '.join(LORA_TARGETS)}"
    return None


def adapter_keys_have_an_adapter(config: RunConfig) -> str | None:
    if config.model.peft.peft_scheme is not None:
        return None
    if config.model.peft.restore_from_path is not None:
        path = config.model.peft.restore_from_path
        return f"model.peft.restore_from_path={path}: has no effect without model.peft.peft_scheme=lora; add it"
    if config.exp_manager.checkpoint_callback_params.export_peft_on_train_end:
        return (
            "exp_manager.checkpoint_callback_params.export_peft_on_train_end=true: no adapter is trained; add "
            "model.peft.peft_scheme=lora, or export_hf_on_train_end"
        )
    return None


PEFT_RULES = (lora_targets_are_known, adapter_keys_have_an_adapter)
