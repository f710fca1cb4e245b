"""From a configuration to a run: groups, data, models, trainer, and back."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.algorithms.table import ALGORITHMS
from megatron_aligndistil.checkpoint.adapter_config import state_entry
from megatron_aligndistil.checkpoint.adapters import export_peft
from megatron_aligndistil.checkpoint.hf_export import export_hf
from megatron_aligndistil.checkpoint.integrity import newest_sound
from megatron_aligndistil.checkpoint.locate import (
    CHECKPOINTS,
    complete_checkpoints,
    metadata_source,
    model_path,
    read_architecture,
)
from megatron_aligndistil.checkpoint.resume import resume
from megatron_aligndistil.checkpoint.training import CheckpointHook, Provenance
from megatron_aligndistil.config.base_schema import ExpManagerConfig
from megatron_aligndistil.config.checks import check_model
from megatron_aligndistil.config.compose import save_resolved
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.data.collate import MicroBatching
from megatron_aligndistil.data.examples import Coordination, ExampleSet, load_examples
from megatron_aligndistil.data.sampler import BatchSampler
from megatron_aligndistil.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_aligndistil.errors import CheckpointError, ConfigError, TrainingError
from megatron_aligndistil.launch.analysis_bench import Bench
from megatron_aligndistil.launch.log_folder import locked, log_directory
from megatron_aligndistil.launch.models import DTYPES, frozen_models, lora_settings, model_settings, trained_chunks
from megatron_aligndistil.launch.rollouts import RolloutModels, rollout_source
from megatron_aligndistil.launch.training_evaluation import Trained, evaluation_hook, measures
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import collectives, groups, setup
from megatron_aligndistil.parallel.setup import Layout
from megatron_aligndistil.trainer.experience import Estimator, ExperiencePasses
from megatron_aligndistil.trainer.hooks import Hook
from megatron_aligndistil.trainer.interruption import Interruption
from megatron_aligndistil.trainer.loop import LoopSettings, Trainer
from megatron_aligndistil.trainer.objective import CRITIC, POLICY, Learner, Objective
from megatron_aligndistil.trainer.optimizer import prepare
from megatron_aligndistil.trainer.reporting import MetricsFile, ProgressBar, TensorBoard, WeightsAndBiases
from megatron_aligndistil.trainer.source import BatchSource, DatasetSource
from megatron_aligndistil.trainer.stragglers import StragglerReport

logger = logging.getLogger(__name__)

# The watchdog says more than a process group that gives up, so it must come first.
_GROUPS_PATIENCE = 2


def run(config: RunConfig, interruption: Interruption | None = None) -> None:
    """Train as ``config`` says, in this process of the group that the launcher started.

    Raises:
        UserError: bad input, in one line.
        Preempted: ``interruption`` has ended it, with its state saved.
    """
    model = config.model
    layout = Layout.of(model)
    setup.initialize(layout, model.seed, config.trainer.accelerator, _GROUPS_PATIENCE * config.trainer.timeout_minutes)
    log_dir = log_directory(config.exp_manager)
    try:
        with locked(log_dir) if groups.world().rank == 0 else nullcontext():
            _train(config, layout, log_dir, interruption)
    finally:
        setup.shutdown()


def _train(config: RunConfig, layout: Layout, log_dir: Path, interruption: Interruption | None) -> None:
    checkpoint = checkpoint_to_resume(config.exp_manager, log_dir)
    algorithm = ALGORITHMS[config.algorithm](config)
    check_model(config, read_architecture(config.model.restore_from_path))
    _check_tokenizers(config, algorithm)
    train, validation = _examples(config, algorithm)
    if groups.world().rank == 0:
        save_resolved(config, log_dir / "config.yaml")

    measured = measures(config, log_dir)
    roles = {**algorithm.every_role, **({} if measured is None else measured.roles)}
    settings, peft = model_settings(config, layout), config.model.peft
    chunks = trained_chunks(config, config.model.restore_from_path, algorithm.scalar, settings, peft.restore_from_path)
    critic = [] if algorithm.critic is None else trained_chunks(config, algorithm.critic.path, True, settings)
    frozen = frozen_models(config, roles, settings, chunks)
    if algorithm.experience is None:
        passes = ExperiencePasses(chunks, critic, frozen, MicroBatching.from_config(config.model, algorithm.kind))
        source: BatchSource = _dataset_source(config, algorithm, passes, train, validation)
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
        if measured is not None:
            trained = Trained(Bench(config, settings), chunks, frozen, source, log_dir)
            hooks.append(evaluation_hook(measured, trained))
        trainer = Trainer(learners, source, _loop_settings(config, total_steps, log_dir), hooks, interruption)
        if checkpoint is not None:
            trainer.step = resume(learners, source, checkpoint, provenance)
            logger.info("resumed from %s after step %d", checkpoint, trainer.step)
        with _storage_errors(log_dir):
            trainer.fit()
    finally:
        source.close()
    _export(config, chunks, log_dir)


@contextmanager
def _storage_errors(log_dir: Path) -> Iterator[None]:
    """What the disk does to a log or a metric, as one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise
        raise TrainingError(
            f"{error.filename or log_dir}: cannot write ({error.strerror}); when it can be written, resume with "
            "exp_manager.resume_if_exists=true"
        ) from error


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


def _export(config: RunConfig, chunks: list[HiddenStateModel], log_dir: Path) -> None:
    """Write what is asked for at the end; results of an earlier end of this run, which was then resumed, give way."""
    asked, base = config.exp_manager.checkpoint_callback_params, config.model.restore_from_path
    folders = {"huggingface": asked.export_hf_on_train_end, "adapter": asked.export_peft_on_train_end}
    if groups.world().rank == 0:
        for folder in (log_dir / name for name, wanted in folders.items() if wanted):
            shutil.rmtree(folder, ignore_errors=True)
    collectives.barrier()
    if asked.export_hf_on_train_end:
        export_hf(chunks, metadata_source(base), log_dir / "huggingface", DTYPES[config.trainer.precision])
    if asked.export_peft_on_train_end:
        export_peft(chunks, model_path(base).resolve(), log_dir / "adapter")


def checkpoint_to_resume(exp_manager: ExpManagerConfig, log_dir: Path) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None to start afresh.

    Raises:
        ConfigError: the run has checkpoints and wasn't told to resume, or has none and must.
        CheckpointError: the newest is damaged.
    """
    complete = collectives.from_first_rank(complete_checkpoints(log_dir))
    params = exp_manager.checkpoint_callback_params
    if exp_manager.resume_if_exists:
        if not complete and not exp_manager.resume_ignore_no_checkpoint:
            raise ConfigError(
                f"exp_manager.resume_if_exists=true: {log_dir / CHECKPOINTS} holds no complete checkpoint; "
                "set exp_manager.resume_ignore_no_checkpoint=true to start from the beginning"
            )
        if complete and params.verify_on_load:
            return newest_sound(complete, params.when_damaged)
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
    config: RunConfig, algorithm: Algorithm, passes: ExperiencePasses, train: ExampleSet, validation: ExampleSet | None
) -> DatasetSource:
    model, limit = config.model, config.trainer.limit_val_batches
    sampler = BatchSampler(len(train), model.global_batch_size, model.seed, model.data.shuffle)
    logger.info("training: %s", sampler.line())
    estimator = Estimator(algorithm.estimate, passes) if algorithm.estimate is not None else None
    return DatasetSource(train, validation, sampler, passes.batching, groups.data(), limit, estimator)


def _provenance(config: RunConfig, train: ExampleSet, rollout: str) -> Provenance:
    model, base = config.model, model_path(config.model.restore_from_path).resolve()
    return Provenance(
        algorithm=config.algorithm,
        optimizer=model.optim.name,
        seed=model.seed,
        global_batch_size=model.global_batch_size,
        train_examples=len(train),
        train_fingerprint=train.fingerprint,
        rollout=rollout,
        lora="" if model.peft.peft_scheme is None else state_entry(lora_settings(model), base),
    )


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
    if every_n_steps := config.trainer.straggler_report_every_n_steps if groups.world().size > 1 else 0:
        hooks.append(StragglerReport(log_dir, every_n_steps))
    if exp.create_checkpoint_callback:
        metadata = metadata_source(config.model.restore_from_path)
        hooks.append(CheckpointHook(log_dir, metadata, provenance, exp.checkpoint_callback_params))
    return hooks
