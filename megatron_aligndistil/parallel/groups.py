"""Where this process stands in the parallel layout: the only reader of Megatron-Core's ``parallel_state``."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One dimension of the layout, as this rank sees it."""

    group: ProcessGroup
    rank: int
    size: int


def tensor() -> Axis:
    """The ranks that share each weight matrix."""
    return _axis(parallel_state.get_tensor_model_parallel_group())


def pipeline() -> Axis:
    """The ranks that hold successive layers."""
    return _axis(parallel_state.get_pipeline_model_parallel_group())


def data() -> Axis:
    """The ranks that hold the same weights and read different examples."""
    return _axis(parallel_state.get_data_parallel_group())


def model() -> Axis:
    """All ranks of one replica: tensor and pipeline together."""
    return _axis(parallel_state.get_model_parallel_group())


def world() -> Axis:
    """Every rank."""
    return Axis(dist.group.WORLD, dist.get_rank(), dist.get_world_size())  # type: ignore[arg-type]


def context() -> Axis:
    """The ranks that hold parts of the same rows."""
    return _axis(parallel_state.get_context_parallel_group())


def is_first_stage() -> bool:
    """Whether this rank holds the embedding."""
    return pipeline().rank == 0


def is_last_stage() -> bool:
    """Whether this rank holds the head (in its last model chunk)."""
    axis = pipeline()
    return axis.rank == axis.size - 1


def is_metrics_rank() -> bool:
    """Whether this rank's losses speak for its replica: last stage, first tensor rank, first context rank."""
    return is_last_stage() and tensor().rank == 0 and context().rank == 0


def _axis(group: ProcessGroup) -> Axis:
    return Axis(group, dist.get_rank(group), dist.get_world_size(group))
