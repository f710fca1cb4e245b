"""The random generators of every rank as tensors, so that a checkpoint holds no pickled objects."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_aligndistil.parallel import groups


def rng_state() -> dict[str, ShardedTensor]:
    """This rank's generators, each a row of a global tensor [world size, ...]."""
    world = groups.world()
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state, (0, world.rank, world.size), prepend_axis_num=1)
        for name, state in _generators().items()
    }


def restore(state: dict[str, Tensor]) -> None:
    """Set this rank's generators to what ``rng_state`` recorded."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, *_ = random.getstate()
    random.setstate((version, tuple(state["python"].tolist()), None))
    keys, position = state["numpy"][:-1].numpy().astype(np.uint32), int(state["numpy"][-1])
    np.random.set_state(("MT19937", keys, position, 0, 0.0))
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: state[f"tracker.{name}"] for name in tracker.get_states()})


def _generators() -> dict[str, Tensor]:
    numpy_state: Any = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.tensor([*numpy_state[1].tolist(), numpy_state[2]]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {f"tracker.{name}": value for name, value in get_cuda_rng_tracker().get_states().items()}
