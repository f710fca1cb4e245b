"""From a configuration to its models: those under training, and the frozen ones, in as little memory as they need."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_aligndistil.algorithms.algorithm import Role
from megatron_aligndistil.checkpoint.adapter_config import SavedAdapter
from megatron_aligndistil.checkpoint.integrity import verify_model
from megatron_aligndistil.checkpoint.locate import model_path, read_architecture, saved_adapter
from megatron_aligndistil.checkpoint.weights import load_adapter, load_weights
from megatron_aligndistil.config.base_schema import ModelConfig
from megatron_aligndistil.config.checks import check_model
from megatron_aligndistil.config.peft_rules import lora_targets
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import CheckpointError, ConfigError
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.lora import TRAINED, LoRASettings, attach, draw
from megatron_aligndistil.models.policy import (
    HiddenStateModel,
    ModelSettings,
    Recompute,
    build_chunks,
    transformer_engine_usable,
)
from megatron_aligndistil.parallel.setup import Layout

logger = logging.getLogger(__name__)

DTYPES = {"64": torch.float64, "32": torch.float32, "bf16-mixed": torch.bfloat16}


def model_settings(config: RunConfig, layout: Layout) -> ModelSettings:
    """What the run decides about each of its models; says in the log which path is taken.

    Raises:
        ConfigError: Transformer Engine is asked for and can't run.
    """
    model = config.model
    usable = transformer_engine_usable()
    if model.transformer_engine and not usable:
        raise ConfigError(
            "model.transformer_engine=true: Transformer Engine is not installed or there is no GPU; "
            "install the gpu extra or leave the key out"
        )
    chosen = usable if model.transformer_engine is None else model.transformer_engine
    adam = next((name for name in ("transformer_engine", "apex") if usable and _installed(name)), "torch")
    logger.info(
        "layout %s, %s; layers: %s; Adam: %s; weights %s",
        layout,
        torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU over gloo",
        "Transformer Engine" if chosen else "Megatron-Core local with torch attention",
        adam,
        config.trainer.precision,
    )
    return ModelSettings(
        layout=layout,
        dtype=DTYPES[config.trainer.precision],
        max_sequence_length=model.encoder_seq_length,
        vocab_divisible_by=model.make_vocab_size_divisible_by,
        transformer_engine=chosen,
        recompute=Recompute(
            model.activations_checkpoint_granularity,
            model.activations_checkpoint_method,
            model.activations_checkpoint_num_layers,
        ),
        separate_norms=model.peft.peft_scheme is not None,
    )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def lora_settings(model: ModelConfig) -> LoRASettings:
    """The adapter that ``model.peft`` asks for."""
    tuning = model.peft.lora_tuning
    alpha = float(tuning.adapter_dim) if tuning.alpha is None else tuning.alpha
    return LoRASettings(tuning.adapter_dim, alpha, lora_targets(tuning.target_modules))


def trained_chunks(
    config: RunConfig, path: str, scalar: bool, settings: ModelSettings, adapter_path: str | None = None
) -> list[HiddenStateModel]:
    """A model to train, with the weights of ``path``; under ``model.peft`` with an adapter, new or of ``adapter_path``.

    Raises:
        CheckpointError: a path is no model, or the adapter belongs to another one.
    """
    architecture = read_architecture(path)
    check_model(config, architecture)
    chunks = build_chunks(architecture.with_scalar_head() if scalar else architecture, settings)
    _verify(config, path)
    load_weights(chunks, path)
    if config.model.peft.peft_scheme is None:
        return chunks
    wanted = lora_settings(config.model)
    if adapter_path is None:
        attach(chunks, TRAINED, wanted)
        draw(chunks, TRAINED, config.model.seed)
    else:
        _verify(config, adapter_path)
        load_adapter(chunks, TRAINED, _adapter_to_go_on_with(adapter_path, path, wanted))
    trained = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    total = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    logger.info(
        "LoRA of rank %d: %s of %s parameters of this rank are trained", wanted.rank, f"{trained:,}", f"{total:,}"
    )
    return chunks


def _verify(config: RunConfig, path: str) -> None:
    if config.exp_manager.checkpoint_callback_params.verify_on_load:
        verify_model(path)


def _adapter_to_go_on_with(adapter_path: str, base: str, wanted: LoRASettings) -> SavedAdapter:
    key = f"model.peft.restore_from_path={adapter_path}"
    saved = saved_adapter(adapter_path)
    if saved is None:
        raise CheckpointError(f"{key}: a whole model, not an adapter; give it as model.restore_from_path")
    if saved.settings != wanted:
        raise CheckpointError(
            f"{key}: an adapter with {saved.settings}, and model.peft.lora_tuning asks for {wanted}; make them the same"
        )
    if saved.base.resolve() != model_path(base).resolve():
        raise CheckpointError(
            f"{key}: an adapter over {saved.base}, not over model.restore_from_path={base}; give that"
        )
    return saved


def frozen_models(
    config: RunConfig, roles: Mapping[str, Role], settings: ModelSettings, policy: Sequence[HiddenStateModel] = ()
) -> dict[str, FrozenModel]:
    """The frozen models: one a path, and adapters over one base share it, with a ``policy`` that trains an adapter too.

    Raises:
        CheckpointError: a path is no model, or the other kind (language or reward model) than its role needs.
    """
    adapted = any(saved_adapter(role.path) for role in roles.values())
    bases = Bases(config, replace(settings, separate_norms=settings.separate_norms or adapted))
    if policy and policy[0].adapters is not None and not policy[0].architecture.scalar_head:
        bases.lend(config.model.restore_from_path, policy)
    by_path: dict[tuple[str, bool], FrozenModel] = {}
    for name, role in roles.items():
        if (role.path, role.scalar) not in by_path:
            by_path[role.path, role.scalar] = bases.model(name, role)
    if shared := [name for name, role in roles.items() if by_path[role.path, role.scalar].chunks == list(policy)]:
        logger.info("in memory once, the policy's base with its adapters: %s", ", ".join(shared))
    return {name: by_path[role.path, role.scalar] for name, role in roles.items()}


def checked_architecture(config: RunConfig, key: str, path: str, scalar: bool) -> Architecture:
    """That of the model which ``key`` names.

    Raises:
        CheckpointError: the path is no model, or the other kind (language or reward model) than is needed.
        ConfigError: it does not fit the layout or the lengths.
    """
    architecture = read_architecture(path)
    if architecture.scalar_head != scalar:
        found, wanted = ("a reward model", "a language model")[:: 1 if architecture.scalar_head else -1]
        raise CheckpointError(f"{key}={path}: {found}, and {wanted} is needed; give another path")
    check_model(config, architecture)
    return architecture


class Bases:
    """Models by the path of their weights, each built once; adapters are laid over them."""

    def __init__(self, config: RunConfig, settings: ModelSettings) -> None:
        self.config, self.settings = config, settings
        self._chunks: dict[tuple[Path, str], Sequence[HiddenStateModel]] = {}
        self._lent: Sequence[HiddenStateModel] | None = None

    def lend(self, path: str, chunks: Sequence[HiddenStateModel]) -> None:
        """Take ``chunks``, which train an adapter over the model at ``path``, as its base."""
        self._chunks[model_path(path).resolve(), ""] = self._lent = chunks

    def model(self, name: str, role: Role) -> FrozenModel:
        """The frozen model of a role; an adapter is laid over its base under ``name``."""
        architecture = checked_architecture(self.config, role.config_key, role.path, role.scalar)
        _verify(self.config, role.path)
        saved = saved_adapter(role.path)
        base = model_path(role.path) if saved is None else saved.base
        # Scalar heads are not part of a base: each reward model has its own.
        key = base.resolve(), name if role.scalar else ""
        if key not in self._chunks:
            self._chunks[key] = build_chunks(architecture, self.settings)
            load_weights(self._chunks[key], base)
        chunks = self._chunks[key]
        if saved is not None:
            load_adapter(chunks, name, saved)
        return FrozenModel(
            chunks, self.config.model.frozen.offload, None if saved is None else name, borrowed=chunks is self._lent
        )
