"""From a configuration to a run: groups, data, models, trainer, and back."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

import torch

from megatron_aligndistil.algorithms.algorithm import Algorithm, Role
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
from megatron_aligndistil.launch.rollouts import RolloutModels, rollout_source
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
from megatron_aligndistil.trainer.objective import CRITIC, POLICY, Learner, Objective
from megatron_aligndistil.trainer.optimizer import prepare
from megatron_aligndistil.trainer.reporting import MetricsFile, ProgressBar, TensorBoard, WeightsAndBiases
from megatron_aligndistil.trainer.source import BatchSource, DatasetSource

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
    check_model(config, read_architecture(config.model.restore_from_path))
    _check_tokenizers(config, algorithm)
    train, validation = _examples(config, algorithm)
    if groups.world().rank == 0:
        save_resolved(config, log_dir / "config.yaml")

    settings = _model_settings(config, layout)
    chunks = _trained_chunks(config, config.model.restore_from_path, algorithm.scalar, settings)
    critic = [] if algorithm.critic is None else _trained_chunks(config, algorithm.critic.path, True, settings)
    frozen = _frozen_models(config, algorithm, settings)
    if algorithm.experience is None:
        source: BatchSource = _dataset_source(config, algorithm, train, validation)
        drawn = ""
    else:
        models = RolloutModels(chunks, critic, frozen, algorithm.experience)
        source, drawn = rollout_source(config, models, train, validation, log_dir)
    try:
        total_steps = config.trainer.max_steps
        if total_steps < 0:
            total_steps = config.trainer.max_epochs * source.steps_per_epoch
        learners = _learners(config, algorithm, (chunks, critic, frozen), total_steps)
        provenance = _provenance(config, train, drawn)
        hooks = _hooks(config, log_dir, provenance)
        trainer = Trainer(learners, source, _loop_settings(config, total_steps, log_dir), hooks)
        if checkpoint is not None:
            trainer.step = resume(learners, source, checkpoint, provenance)
            logger.info("resumed from %s after step %d", checkpoint, trainer.step)
        trainer.fit()
    finally:
        source.close()
    if config.exp_manager.checkpoint_callback_params.export_hf_on_train_end:
        _export(config, chunks, log_dir / "huggingface")


def _learners(
    config: RunConfig,
    algorithm: Algorithm,
    models: tuple[list[HiddenStateModel], list[HiddenStateModel], dict[str, FrozenModel]],
    total_steps: int,
) -> list[Learner]:
    chunks, critic, frozen = models
    clip = config.trainer.gradient_clip_val
    policy = prepare(chunks, config.model.optim, clip, total_steps)
    learners = [Learner(POLICY, policy, Objective(algorithm, chunks, frozen))]
    if algorithm.critic is not None:
        of_critic = Algorithm(CRITIC, algorithm.kind, algorithm.critic.loss, scalar=True)
        trained = prepare(critic, algorithm.critic.optim, clip, total_steps)
        learners.append(Learner(CRITIC, trained, Objective(of_critic, critic, {})))
    return learners


def _trained_chunks(config: RunConfig, path: str, scalar: bool, settings: ModelSettings) -> list[HiddenStateModel]:
    architecture = read_architecture(path)
    check_model(config, architecture)
    chunks = build_chunks(architecture.with_scalar_head() if scalar else architecture, settings)
    load_weights(chunks, path)
    return chunks


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
    others = [(role.config_key, role.path) for role in algorithm.every_role.values()]
    if algorithm.critic is not None:
        others.append((algorithm.critic.config_key, algorithm.critic.path))
    for key, path in others:
        if path != config.model.restore_from_path and fingerprint(path) != own:
            raise CheckpointError(
                f"{key}={path}: its tokenizer is not the one of model.restore_from_path="
                f"{config.model.restore_from_path}; distributions over different vocabularies cannot be compared: "
                "take a model of the same family and tokenizer"
            )


def _examples(config: RunConfig, algorithm: Algorithm) -> tuple[ExampleSet, ExampleSet | None]:
    """The training examples, and the validation ones where there are any."""
    model = config.model
    tokenizer = load_tokenizer(str(metadata_source(model.restore_from_path)), model.data.chat_template)
    coordination = Coordination(is_builder=os.environ.get("LOCAL_RANK", "0") == "0", barrier=collectives.barrier)

    def examples(split: str) -> ExampleSet:
        loaded, _ = load_examples(
            model.data, split, algorithm.kind, tokenizer, model.encoder_seq_length, algorithm.transform, coordination
        )
        return loaded

    train = examples("train")
    return train, examples("validation") if model.data.data_prefix.validation else None


def _dataset_source(
    config: RunConfig, algorithm: Algorithm, train: ExampleSet, validation: ExampleSet | None
) -> DatasetSource:
    model = config.model
    sampler = BatchSampler(len(train), model.global_batch_size, model.seed, model.data.shuffle)
    logger.info("training: %s", sampler.line())
    batching = MicroBatching.from_config(model, algorithm.kind)
    return DatasetSource(train, validation, sampler, batching, groups.data(), config.trainer.limit_val_batches)


def _provenance(config: RunConfig, train: ExampleSet, rollout: str) -> Provenance:
    model = config.model
    return Provenance(
        algorithm=config.algorithm,
        optimizer=model.optim.name,
        seed=model.seed,
        global_batch_size=model.global_batch_size,
        train_examples=len(train),
        train_fingerprint=train.fingerprint,
        rollout=rollout,
    )


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
    by_path: dict[tuple[str, bool], FrozenModel] = {}
    for role in algorithm.every_role.values():
        key = role.path, role.scalar
        if key not in by_path:
            by_path[key] = FrozenModel(_frozen_chunks(config, role, settings), config.model.frozen.offload)
    return {name: by_path[role.path, role.scalar] for name, role in algorithm.every_role.items()}


def _frozen_chunks(config: RunConfig, role: Role, settings: ModelSettings) -> list[HiddenStateModel]:
    architecture = read_architecture(role.path)
    if architecture.scalar_head != role.scalar:
        found, wanted = ("a reward model", "a language model")[:: 1 if architecture.scalar_head else -1]
        raise CheckpointError(f"{role.config_key}={role.path}: {found}, and {wanted} is needed; give another path")
    check_model(config, architecture)
    chunks = build_chunks(architecture, settings)
    load_weights(chunks, role.path)
    return chunks


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
