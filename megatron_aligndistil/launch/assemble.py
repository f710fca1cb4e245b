"""From a configuration to a run: groups, data, models, trainer, and back."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

import torch

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.algorithms.table import ALGORITHMS
from megatron_aligndistil.checkpoint.hf_export import export_hf
from megatron_aligndistil.checkpoint.locate import (
    CHECKPOINTS,
    complete_checkpoints,
    metadata_source,
    read_architecture,
)
from megatron_aligndistil.checkpoint.training import CheckpointHook, Provenance, resume
from megatron_aligndistil.checkpoint.weights import load_weights
from megatron_aligndistil.config.checks import check_model
from megatron_aligndistil.config.compose import save_resolved
from megatron_aligndistil.config.schema import ExpManagerConfig, RunConfig
from megatron_aligndistil.data.collate import MicroBatching
from megatron_aligndistil.data.examples import Coordination, ExampleSet, load_examples
from megatron_aligndistil.data.sampler import BatchSampler
from megatron_aligndistil.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_aligndistil.errors import CheckpointError, ConfigError
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.policy import (
    HiddenStateModel,
    ModelSettings,
    Recompute,
    build_chunks,
    transformer_engine_usable,
)
from megatron_aligndistil.parallel import collectives, groups, setup
from megatron_aligndistil.parallel.setup import Layout
from megatron_aligndistil.trainer.hooks import Hook
from megatron_aligndistil.trainer.loop import LoopSettings, Trainer
from megatron_aligndistil.trainer.objective import Objective
from megatron_aligndistil.trainer.optimizer import prepare
from megatron_aligndistil.trainer.reporting import MetricsFile, ProgressBar, TensorBoard, WeightsAndBiases
from megatron_aligndistil.trainer.source import DatasetSource

logger = logging.getLogger(__name__)

DTYPES = {"64": torch.float64, "32": torch.float32, "bf16-mixed": torch.bfloat16}


def run(config: RunConfig) -> None:
    """Train as ``config`` says, in this process of the group that the launcher started.

    Raises:
        UserError: bad input, in one line.
    """
    model = config.model
    layout = Layout.of(model)
    setup.initialize(layout, model.seed, config.trainer.accelerator, config.trainer.timeout_minutes)
    try:
        _train(config, layout)
    finally:
        setup.shutdown()


def _train(config: RunConfig, layout: Layout) -> None:
    log_dir = log_directory(config.exp_manager)
    checkpoint = checkpoint_to_resume(config.exp_manager, log_dir)
    algorithm = ALGORITHMS[config.algorithm](config)
    architecture = read_architecture(config.model.restore_from_path)
    check_model(config, architecture)
    _check_tokenizers(config, algorithm)
    source, provenance = _data(config, algorithm)
    total_steps = config.trainer.max_steps
    if total_steps < 0:
        total_steps = config.trainer.max_epochs * source.steps_per_epoch
    if groups.world().rank == 0:
        save_resolved(config, log_dir / "config.yaml")

    settings = _model_settings(config, layout)
    chunks = build_chunks(architecture, settings)
    load_weights(chunks, checkpoint or config.model.restore_from_path)
    frozen = _frozen_models(config, algorithm, settings)
    policy = prepare(chunks, config.model.optim, config.trainer.gradient_clip_val, total_steps)
    trainer = Trainer(
        Objective(algorithm, chunks, frozen),
        policy,
        source,
        _loop_settings(config, total_steps, log_dir),
        _hooks(config, log_dir, provenance),
    )
    if checkpoint is not None:
        trainer.step = resume(policy, checkpoint, provenance)
        logger.info("resumed from %s after step %d", checkpoint, trainer.step)
    trainer.fit()
    if config.exp_manager.checkpoint_callback_params.export_hf_on_train_end:
        _export(config, chunks, log_dir / "huggingface")


def _export(config: RunConfig, chunks: list[HiddenStateModel], folder: Path) -> None:
    if groups.world().rank == 0:
        # Of an earlier end of this run, which was then resumed.
        shutil.rmtree(folder, ignore_errors=True)
    collectives.barrier()
    export_hf(chunks, metadata_source(config.model.restore_from_path), folder, DTYPES[config.trainer.precision])


def log_directory(exp_manager: ExpManagerConfig) -> Path:
    """Where the run's results go."""
    return Path(exp_manager.explicit_log_dir or Path("runs") / exp_manager.name)


def checkpoint_to_resume(exp_manager: ExpManagerConfig, log_dir: Path) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None to start afresh.

    Raises:
        ConfigError: the run has checkpoints and wasn't told to resume, or has none and must.
    """
    complete = collectives.from_first_rank(complete_checkpoints(log_dir))
    if exp_manager.resume_if_exists:
        if not complete and not exp_manager.resume_ignore_no_checkpoint:
            raise ConfigError(
                f"exp_manager.resume_if_exists=true: {log_dir / CHECKPOINTS} holds no complete checkpoint; "
                "set exp_manager.resume_ignore_no_checkpoint=true to start from the beginning"
            )
        return complete[-1] if complete else None
    if complete:
        raise ConfigError(
            f"exp_manager.explicit_log_dir={log_dir} holds checkpoints of an earlier run ({complete[-1].name}); set "
            "exp_manager.resume_if_exists=true to go on from it, or another exp_manager.name"
        )
    return None


def _check_tokenizers(config: RunConfig, algorithm: Algorithm) -> None:
    def fingerprint(path: str) -> str:
        return tokenizer_fingerprint(load_tokenizer(str(metadata_source(path))))

    own = fingerprint(config.model.restore_from_path)
    for role in algorithm.roles.values():
        if role.path != config.model.restore_from_path and fingerprint(role.path) != own:
            raise CheckpointError(
                f"{role.config_key}={role.path}: its tokenizer is not the one of model.restore_from_path="
                f"{config.model.restore_from_path}; distributions over different vocabularies cannot be compared: "
                "take a model of the same family and tokenizer"
            )


def _data(config: RunConfig, algorithm: Algorithm) -> tuple[DatasetSource, Provenance]:
    model = config.model
    tokenizer = load_tokenizer(str(metadata_source(model.restore_from_path)), model.data.chat_template)
    coordination = Coordination(is_builder=os.environ.get("LOCAL_RANK", "0") == "0", barrier=collectives.barrier)

    def examples(split: str) -> ExampleSet:
        loaded, _ = load_examples(
            model.data, split, algorithm.kind, tokenizer, model.encoder_seq_length, algorithm.transform, coordination
        )
        return loaded

    train = examples("train")
    validation = examples("validation") if model.data.data_prefix.validation else None
    sampler = BatchSampler(len(train), model.global_batch_size, model.seed, model.data.shuffle)
    logger.info("training: %s", sampler.line())
    source = DatasetSource(
        train,
        validation,
        sampler,
        MicroBatching.from_config(model, algorithm.kind),
        groups.data(),
        config.trainer.limit_val_batches,
    )
    provenance = Provenance(
        algorithm=algorithm.name,
        optimizer=model.optim.name,
        seed=model.seed,
        global_batch_size=model.global_batch_size,
        train_examples=len(train),
        train_fingerprint=train.fingerprint,
    )
    return source, provenance


def _model_settings(config: RunConfig, layout: Layout) -> ModelSettings:
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
    )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _frozen_models(config: RunConfig, algorithm: Algorithm, settings: ModelSettings) -> dict[str, FrozenModel]:
    """One model a path: roles that name the same one share it."""
    by_path: dict[str, FrozenModel] = {}
    for role in algorithm.roles.values():
        if role.path not in by_path:
            chunks = build_chunks(read_architecture(role.path), settings)
            load_weights(chunks, role.path)
            by_path[role.path] = FrozenModel(chunks, config.model.frozen.offload)
    return {name: by_path[role.path] for name, role in algorithm.roles.items()}


def _loop_settings(config: RunConfig, total_steps: int, log_dir: Path) -> LoopSettings:
    trainer = config.trainer
    return LoopSettings(
        total_steps, trainer.val_check_interval, trainer.val_before_training, trainer.val_after_training, log_dir
    )


def _hooks(config: RunConfig, log_dir: Path, provenance: Provenance) -> list[Hook]:
    exp, every = config.exp_manager, config.trainer.log_every_n_steps
    hooks: list[Hook] = []
    if groups.world().rank == 0:
        log_dir.mkdir(parents=True, exist_ok=True)
        hooks += [MetricsFile(log_dir, every), ProgressBar(exp.name)]
        if exp.create_tensorboard_logger:
            hooks.append(TensorBoard(log_dir, every))
        if exp.create_wandb_logger:
            hooks.append(WeightsAndBiases(log_dir, exp.name, exp.wandb_logger_kwargs, every))
    if exp.create_checkpoint_callback:
        metadata = metadata_source(config.model.restore_from_path)
        hooks.append(CheckpointHook(log_dir, metadata, provenance, exp.checkpoint_callback_params))
    return hooks
