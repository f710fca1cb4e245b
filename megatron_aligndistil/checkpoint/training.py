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
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from safetensors.numpy import save_file
from torch.distributed.checkpoint.api import CheckpointException

from megatron_aligndistil.checkpoint import rng
from megatron_aligndistil.checkpoint.locate import CHECKPOINTS, FORMAT, METADATA, STATE, WEIGHTS, read_state
from megatron_aligndistil.checkpoint.manifest import leave_records, write_manifest
from megatron_aligndistil.checkpoint.metadata import copy_metadata
from megatron_aligndistil.checkpoint.weights import model_state, reason
from megatron_aligndistil.config.base_schema import CheckpointCallbackConfig
from megatron_aligndistil.errors import CheckpointError, ConfigError
from megatron_aligndistil.parallel import collectives
from megatron_aligndistil.parallel.lifetime import outlive_signals
from megatron_aligndistil.trainer.hooks import Hook, Metrics
from megatron_aligndistil.trainer.loop import Trainer
from megatron_aligndistil.trainer.objective import POLICY, Learner

logger = logging.getLogger(__name__)

_UNFINISHED = ".step_"  # a killed run's leftovers, which the next one removes
_METADATA_ONCE = f"{_UNFINISHED}metadata"
SOURCE = "rollout.safetensors"  # what the source of batches keeps

# Optimizer state as one tensor a parameter, whatever ranks it was sharded over.
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# What torch's writer says of a full disk, by a RuntimeError like any other.
_TORCH_CANNOT_WRITE = ("iostream error", "inline_container", "PytorchStreamWriter")
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
    """Saves every ``every_n_train_steps`` steps and at the end; keeps the newest ``save_top_k``, or the best by
    a validation metric and the newest.
    """

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
        self._monitored: tuple[int, float] = (-1, 0.0)  # the step of the last validation, and its metric

    def on_start(self, trainer: Trainer) -> None:
        self._saved_at = trainer.step if trainer.step else -1
        if dist.get_rank() == 0:
            for leftover in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover)

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        with write_errors(self.folder):
            self._queue.maybe_finalize_async_calls(blocking=False)
        if self._is_due(trainer) and not self._waits_for_validation(trainer):
            self._save(trainer)

    def on_validation(self, trainer: Trainer, metrics: Metrics) -> None:
        monitor = self.settings.monitor
        if monitor is None:
            return
        if monitor not in metrics:
            raise ConfigError(
                f"exp_manager.checkpoint_callback_params.monitor={monitor}: validation has no such metric; there are "
                f"{', '.join(sorted(metrics))}"
            )
        self._monitored = trainer.step, metrics[monitor]
        if self._is_due(trainer) and self._waits_for_validation(trainer) and self._saved_at != trainer.step:
            self._save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        interval = self.settings.every_n_train_steps
        return interval > 0 and trainer.step > 0 and trainer.step % interval == 0

    def _waits_for_validation(self, trainer: Trainer) -> bool:
        """Whether the metric that a checkpoint of this step is judged by comes after the step's own."""
        interval = trainer.settings.val_check_interval
        return self.settings.monitor is not None and interval > 0 and trainer.step % interval == 0

    def on_pause(self, trainer: Trainer) -> None:
        self._wait()

    def on_preempted(self, trainer: Trainer) -> None:
        self._save_and_wait(trainer, wanted=trainer.step > 0)

    def on_end(self, trainer: Trainer) -> None:
        self._save_and_wait(trainer, wanted=self.settings.save_on_train_end)

    def _save_and_wait(self, trainer: Trainer, wanted: bool) -> None:
        if wanted and self._saved_at != trainer.step:
            self._save(trainer)
        self._wait()

    def _wait(self) -> None:
        with write_errors(self.folder):
            self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        self._queue.close()
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder / _METADATA_ONCE, ignore_errors=True)
        if self._manager is not None:
            self._manager.shutdown()

    def _save(self, trainer: Trainer) -> None:
        start = time.perf_counter()
        final = self.folder / f"step_{trainer.step:08d}"
        # Named anew each time: a writer that outlived a killed run may still write into its own.
        partial = self.folder / collectives.from_first_rank(f".{final.name}.{uuid.uuid4().hex}")
        validated_at, value = self._monitored
        monitored = value if validated_at == trainer.step else None
        state = {"format": FORMAT, "step": trainer.step, "monitored": monitored, **vars(self.provenance)}
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
                request = _hashed(request, partial, folder_of(learner))
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
            shutil.copytree(self._metadata_of(trainer), partial / METADATA)
            if source is not None:
                save_file(dict(source.arrays), partial / SOURCE, metadata={"state": source.text})
        dist.barrier()

    def _metadata_of(self, trainer: Trainer) -> Path:
        """A folder with what accompanies the weights, made once: to read it out of a GGUF file takes seconds."""
        folder = self.folder / _METADATA_ONCE
        if not folder.is_dir():
            policy = trainer.learners[0].model.chunks[0].architecture
            copy_metadata(self.metadata, folder, scalar_head=policy.scalar_head)
        return folder

    def _finalize(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            with (partial / STATE).open("w") as file:
                json.dump({**state, "world_size": dist.get_world_size()}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            write_manifest(partial)
            _discard(final)  # of an earlier end of this run, which was then resumed further back
            os.replace(partial, final)
            _settle(self.folder)
            self._prune()
        dist.barrier()

    def _prune(self) -> None:
        keep, steps = self.settings.save_top_k, sorted(self.folder.glob("step_*"))
        if keep <= 0:
            return
        kept = steps[-keep:]
        if self.settings.monitor is not None:
            sign = 1 if self.settings.mode == "min" else -1
            monitored = {step: read_state(step).get("monitored") for step in reversed(steps)}
            judged = {step: sign * value for step, value in monitored.items() if value is not None}
            kept = [steps[-1], *sorted(judged, key=judged.__getitem__)[:keep]]
        for old in set(steps) - set(kept):
            _discard(old)


def _discard(checkpoint: Path) -> None:
    """Renamed first: a half-deleted folder must not look like a checkpoint."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.{uuid.uuid4().hex}")
        os.replace(checkpoint, hidden)
        shutil.rmtree(hidden)


def _settle(folder: Path) -> None:
    """See the names in ``folder`` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hashed(request: AsyncRequest, checkpoint: Path, folder: str) -> AsyncRequest:
    """``request`` with its files hashed by the process that has written them, while training goes on."""
    rank, write = dist.get_rank(), request.async_fn
    if write is None:
        return request

    def write_and_hash(*arguments: Any, **keywords: Any) -> None:
        write(*arguments, **keywords)
        with contextlib.suppress(OSError):  # a full disk: ending the write says so, on every rank
            leave_records(checkpoint, folder, rank)

    return request._replace(async_fn=write_and_hash)


def _collect_results(in_background: bool) -> SyncManager | None:
    """Where Megatron-Core's writer processes put what they wrote.

    Its own choice is a server process a rank that outlives a killed rank; this one doesn't. Writing in the foreground
    needs none.
    """
    if not in_background:
        filesystem_async._results_queue = queue.Queue()
        return None
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(outlive_signals, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()
    return manager


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """A failure to write, in this process or in the one that writes for it, as one line."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
        if type(error) is RuntimeError and not any(words in str(error) for words in _TORCH_CANNOT_WRITE):
            raise
        # A full disk shows as many different errors, or as none on the other ranks.
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 2**30
        raise CheckpointError(
            f"{folder}: cannot write the checkpoint: {reason(error)}; {free:.2f} GiB are free there; when it can be "
            "written, resume from the last good one with exp_manager.resume_if_exists=true"
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
