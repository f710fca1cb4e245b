"""Going on from a checkpoint of a run, under this layout whatever it was written under."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from safetensors import SafetensorError, safe_open

from megatron_aligndistil.checkpoint import rng
from megatron_aligndistil.checkpoint.locate import STATE, read_state
from megatron_aligndistil.checkpoint.training import SOURCE, Provenance, folder_of, training_state
from megatron_aligndistil.checkpoint.weights import load_distributed, load_in_place
from megatron_aligndistil.errors import CheckpointError, reason
from megatron_aligndistil.trainer.objective import Learner
from megatron_aligndistil.trainer.source import BatchSource, SourceState

Restored = TypeVar("Restored")
_SHOWN_CHARACTERS = 300


def resume(learners: Sequence[Learner], source: BatchSource, checkpoint: Path, provenance: Provenance) -> int:
    """Continue from ``checkpoint``, under this layout whatever it was written under; returns the steps done.

    Raises:
        CheckpointError: it is damaged, or belongs to a run on other data, of another batch size or another algorithm.
    """
    state = read_state(checkpoint)
    for name, value in vars(provenance).items():
        if state.get(name, "") != value:
            shown = repr(state.get(name))[:_SHOWN_CHARACTERS]
            raise CheckpointError(
                f"{checkpoint / STATE}: {name} was {shown} when it was saved and is {value!r} now, so the "
                "run cannot go on where it was; restore it, or start another run (exp_manager.name) with "
                f"model.restore_from_path={checkpoint}"
            )
    for learner in learners:
        _resume_learner(learner, checkpoint, state)
    if (checkpoint / SOURCE).is_file():
        read_rollout(checkpoint / SOURCE, source.restore)
    return state["step"]


def _resume_learner(learner: Learner, checkpoint: Path, state: dict[str, Any]) -> None:
    model, folder = learner.model, checkpoint / folder_of(learner)
    load_in_place(model.chunks, folder)
    adam = _torch_adam(model.optimizer)
    if adam is not None:
        _create_adam_state(adam)
    target = {k: v for k, v in training_state(learner, loading=True).items() if k in ("optimizer", "rng")}
    same_ranks = state.get("world_size") == dist.get_world_size()
    if not same_ranks:
        # Another number of ranks has other generators; nothing in training draws from them.
        target.pop("rng", None)
    loaded = load_distributed(target, folder)
    try:
        _load_optimizer(model.optimizer, loaded["optimizer"])
        if "rng" in loaded:
            rng.restore(loaded["rng"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: the state of optimizer and random generators is damaged, or another optimizer's "
            f"({reason(error)}); resume from another"
        ) from error
    # The schedule is the configuration's; only its position is the checkpoint's.
    model.scheduler.step(state["step"])


def read_rollout(file: Path, restore: Callable[[SourceState], Restored]) -> Restored:
    """What ``restore`` makes of a rollout's file.

    Raises:
        CheckpointError: the file is damaged, or not a rollout's.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return restore(SourceState(arrays, opened.metadata()["state"]))
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not a rollout's file, or cut short ({reason(error)}); resume from another"
        ) from error


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
