"""Checkpoints of a run under training: written asynchronously, current only when whole, readable under any layout.

A checkpoint is written under a hidden name and renamed when every rank is done, so a crash while saving leaves the last
good one current.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import multiprocessing
import os
import queue
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.distributed.checkpoint.api import CheckpointException

from megatron_aligndistil.checkpoint import rng
from megatron_aligndistil.checkpoint.locate import CHECKPOINTS, FORMAT, METADATA, STATE, WEIGHTS, read_state
from megatron_aligndistil.checkpoint.metadata import copy_metadata
from megatron_aligndistil.checkpoint.weights import load_distributed, load_in_place, model_state, reason
from megatron_aligndistil.config.base_schema import CheckpointCallbackConfig
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.parallel import collectives
from megatron_aligndistil.parallel.lifetime import die_with
from megatron_aligndistil.trainer.hooks import Hook, Metrics
from megatron_aligndistil.trainer.loop import Trainer
from megatron_aligndistil.trainer.objective import POLICY, Learner
from megatron_aligndistil.trainer.source import BatchSource, SourceState

logger = logging.getLogger(__name__)

SOURCE = "rollout.safetensors"  # what the source of batches keeps

# Optimizer state as one tensor a parameter, whatever ranks it was sharded over.
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# Newer Megatron-Core would write by another package; its own writer is what the older has.
_WRITER: dict[str, Any] = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)


@dataclass(frozen=True)
class Provenance:
    """What must stay the same for a resumed run to go on with the right examples and the right optimizer state."""

    algorithm: str
    optimizer: str
    seed: int
    global_batch_size: int
    train_examples: int
    train_fingerprint: str
    rollout: str = ""
    lora: dict[str, Any] | str = ""  # what the adapter under training is, and its base's path; "" where there is none


class CheckpointHook(Hook):
    """Saves every ``every_n_train_steps`` steps and at the end; keeps the newest ``save_top_k``."""

    def __init__(
        self, log_dir: Path, metadata: Path, provenance: Provenance, settings: CheckpointCallbackConfig
    ) -> None:
        self.folder = log_dir / CHECKPOINTS
        self.metadata = metadata
        self.provenance = provenance
        self.settings = settings
        self._queue = AsyncCallsQueue()
        self._manager = _collect_results(settings.async_save)
        self._saved_at = -1

    def on_start(self, trainer: Trainer) -> None:
        self._saved_at = trainer.step if trainer.step else -1
        if dist.get_rank() == 0:
            for leftover in self.folder.glob(".step_*"):
                shutil.rmtree(leftover)

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        with write_errors(self.folder):
            self._queue.maybe_finalize_async_calls(blocking=False)
        interval = self.settings.every_n_train_steps
        if interval and trainer.step % interval == 0:
            self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.settings.save_on_train_end and self._saved_at != trainer.step:
            self._save(trainer)
        with write_errors(self.folder):
            self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        self._queue.close()
        if self._manager is not None:
            self._manager.shutdown()

    def _save(self, trainer: Trainer) -> None:
        start = time.perf_counter()
        final = self.folder / f"step_{trainer.step:08d}"
        # Named anew each time: a writer that outlived a killed run may still write into its own.
        partial = self.folder / collectives.from_first_rank(f".{final.name}.{uuid.uuid4().hex}")
        state = {"format": FORMAT, "step": trainer.step, **vars(self.provenance)}
        with write_errors(final):
            # Two saves at once would double the memory that they hold.
            self._queue.maybe_finalize_async_calls(blocking=True)
            self._prepare(partial, trainer)
            for learner in trainer.learners:
                request = dist_checkpointing.save(
                    training_state(learner),
                    str(partial / folder_of(learner)),
                    async_sharded_save=True,
                    validate_access_integrity=dist.get_world_size() > 1,
                    **_WRITER,
                )
                if learner is trainer.learners[-1]:  # requests are finished in their order
                    request.add_finalize_fn(lambda: self._finalize(partial, final, state))
                if self.settings.async_save:
                    self._queue.schedule_async_request(request)
                else:
                    request.execute_sync()
        self._saved_at = trainer.step
        logger.info("checkpoint %s: training waited %.2f s for it", final, time.perf_counter() - start)

    def _prepare(self, partial: Path, trainer: Trainer) -> None:
        source = trainer.source.state(trainer.step)
        if dist.get_rank() == 0:
            for learner in trainer.learners:
                (partial / folder_of(learner)).mkdir(parents=True)
            policy = trainer.learners[0].model.chunks[0].architecture
            copy_metadata(self.metadata, partial / METADATA, scalar_head=policy.scalar_head)
            if source is not None:
                save_file(dict(source.arrays), partial / SOURCE, metadata={"state": source.text})
        dist.barrier()

    def _finalize(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            with (partial / STATE).open("w") as file:
                json.dump({**state, "world_size": dist.get_world_size()}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            self._prune()
        dist.barrier()

    def _prune(self) -> None:
        keep = self.settings.save_top_k
        steps = sorted(self.folder.glob("step_*"))
        for old in steps[:-keep] if keep > 0 else []:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            hidden = old.with_name(f".{old.name}")
            os.replace(old, hidden)
            shutil.rmtree(hidden)


def _collect_results(in_background: bool) -> SyncManager | None:
    """Where Megatron-Core's writer processes put what they wrote.

    Its own choice is a server process a rank that outlives a killed rank; this one doesn't. Writing in the foreground
    needs none.
    """
    if not in_background:
        filesystem_async._results_queue = queue.Queue()
        return None
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(die_with, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()
    return manager


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """A failure to write, in this process or in the one that writes for it, as one line."""
    try:
        yield
    except (OSError, CheckpointingException, CheckpointException) as error:
        raise CheckpointError(
            f"{folder}: cannot write the checkpoint: {reason(error)}; free space there, then resume from the last "
            "good one with exp_manager.resume_if_exists=true"
        ) from error


def folder_of(learner: Learner) -> str:
    """The folder of a model in a checkpoint: the policy's is the one that the checkpoint is known by."""
    return WEIGHTS if learner.name == POLICY else learner.name


def training_state(learner: Learner, loading: bool = False) -> dict[str, Any]:
    """Weights and optimizer as Megatron-Core shards them; with the policy's the random generators of this rank."""
    model = model_state(learner.model.chunks)
    flat = {f"{part}.{name}": tensor for part, tensors in model.items() for name, tensor in tensors.items()}
    optimizer = learner.model.optimizer.sharded_state_dict(flat, is_loading=loading, metadata=dict(_OPTIMIZER_METADATA))
    generators = {"rng": rng.rng_state()} if learner.name == POLICY else {}
    return {**model, "optimizer": optimizer, **generators}


def resume(learners: Sequence[Learner], source: BatchSource, checkpoint: Path, provenance: Provenance) -> int:
    """Continue from ``checkpoint``, under this layout whatever it was written under; returns the steps done.

    Raises:
        CheckpointError: it is damaged, or belongs to a run on other data, of another batch size or another algorithm.
    """
    state = read_state(checkpoint)
    for name, value in vars(provenance).items():
        if state.get(name, "") != value:
            raise CheckpointError(
                f"{checkpoint / STATE}: {name} was {state.get(name)!r} when it was saved and is {value!r} now, so the "
                "run cannot go on where it was; restore it, or start another run (exp_manager.name) with "
                f"model.restore_from_path={checkpoint}"
            )
    for learner in learners:
        _resume_learner(learner, checkpoint, state)
    if (checkpoint / SOURCE).is_file():
        source.restore(_read_source(checkpoint / SOURCE))
    return state["step"]


def _resume_learner(learner: Learner, checkpoint: Path, state: dict[str, Any]) -> None:
    model, folder = learner.model, checkpoint / folder_of(learner)
    load_in_place(model.chunks, folder)
    adam = _torch_adam(model.optimizer)
    if adam is not None:
        _create_adam_state(adam)
    target = {k: v for k, v in training_state(learner, loading=True).items() if k in ("optimizer", "rng")}
    same_ranks = state["world_size"] == dist.get_world_size()
    if not same_ranks:
        # Another number of ranks has other generators; nothing in training draws from them.
        target.pop("rng", None)
    loaded = load_distributed(target, folder)
    _load_optimizer(model.optimizer, loaded["optimizer"])
    # The schedule is the configuration's; only its position is the checkpoint's.
    model.scheduler.step(state["step"])
    if "rng" in loaded:
        rng.restore(loaded["rng"])


def _read_source(file: Path) -> SourceState:
    try:
        with safe_open(file, framework="numpy") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return SourceState(arrays, opened.metadata()["state"])
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a rollout's file, or cut short ({error}); resume from another") from error


def _torch_adam(optimizer: MegatronOptimizer) -> torch.optim.Adam | None:
    """torch's Adam inside ``optimizer``; None where it is Transformer Engine's or Apex's."""
    (dense,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return dense.optimizer if isinstance(dense.optimizer, torch.optim.Adam) else None


def _create_adam_state(adam: torch.optim.Adam) -> None:
    """torch's Adam creates its state in its first step; the sharded optimizer must have it before it can load it."""
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.zeros(()), **zeros}


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Megatron-Core's sharded optimizer does not carry torch's step counts: they are handed to it, one a parameter."""
    adam = _torch_adam(optimizer)
    (dense,) = getattr(optimizer, "chained_optimizers", [optimizer])
    if adam is None or not isinstance(dense, DistributedOptimizer):
        optimizer.load_state_dict(state)
        return
    step = torch.tensor(float(state["optimizer"]["param_groups"][0]["step"]))
    settle = dense._set_main_param_and_optimizer_states
    dense._set_main_param_and_optimizer_states = lambda parameter, tensors: settle(parameter, {**tensors, "step": step})
    try:
        optimizer.load_state_dict(state)
    finally:
        del dense._set_main_param_and_optimizer_states
    for values in adam.state.values():
        values["step"] = step.clone()  # else all share one counter, and each would advance it
