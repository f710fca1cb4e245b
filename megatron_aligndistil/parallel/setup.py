"""Starting and ending the process groups of a layout."""

from __future__ import annotations

import datetime
import logging
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_aligndistil.config.base_schema import ModelConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.parallel import cpu

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How a model is spread over processes; data parallelism takes what is left of the world."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    sequence_parallel: bool = False

    @classmethod
    def of(cls, model: ModelConfig) -> Layout:
        """The layout that a run's configuration asks for."""
        return cls(
            tensor=model.tensor_model_parallel_size,
            pipeline=model.pipeline_model_parallel_size,
            virtual_pipeline=model.virtual_pipeline_model_parallel_size,
            context=model.context_parallel_size,
            sequence_parallel=model.sequence_parallel,
        )

    @property
    def replica_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    def __str__(self) -> str:
        text = f"TP={self.tensor} PP={self.pipeline}"
        text += f" VPP={self.virtual_pipeline}" if self.virtual_pipeline else ""
        text += f" CP={self.context}" if self.context > 1 else ""
        return text + (" SP" if self.sequence_parallel else "")


def device_of(accelerator: str) -> torch.device:
    """The device of this process for ``trainer.accelerator`` (auto, gpu or cpu).

    Raises:
        ConfigError: ``gpu`` without one, or ``cpu`` where CUDA is present (Megatron-Core would use it all the same).
    """
    present = torch.cuda.is_available()
    if accelerator == "gpu" and not present:
        raise ConfigError("trainer.accelerator=gpu: torch sees no CUDA device here; use auto or cpu")
    if accelerator == "cpu" and present:
        raise ConfigError("trainer.accelerator=cpu: CUDA is visible to this process; set CUDA_VISIBLE_DEVICES= as well")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if present else torch.device("cpu")


def initialize(layout: Layout, seed: int, accelerator: str = "auto", timeout_minutes: float = 30.0) -> torch.device:
    """Start torch.distributed (from torchrun's variables, or a world of one) and Megatron-Core's groups, and seed.

    Returns the device of this process.

    Raises:
        ConfigError: the world isn't a multiple of the layout's replica size.
    """
    device = device_of(accelerator)
    cpu.install()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    if world % layout.replica_size:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes = {world} processes do not fit the layout {layout} "
            f"(a replica takes {layout.replica_size}); use a multiple of {layout.replica_size}"
        )
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
    )
    seed_everything(seed)
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron-Core's per-rank generators."""
    from megatron.core import parallel_state, tensor_parallel

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def shutdown() -> None:
    """End the groups, so that the process can exit (or start others)."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
