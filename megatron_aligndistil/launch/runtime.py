"""This machine against what a run asks for."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_aligndistil.config.checks import Runtime, check_runtime
from megatron_aligndistil.config.schema import RunConfig


def check_here(run: RunConfig) -> None:
    """Raise ConfigError where this machine lacks GPUs or a package that ``run`` needs."""
    import torch

    installed = frozenset(name for name in ("transformer_engine", "wandb") if find_spec(name) is not None)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    check_runtime(run, Runtime(gpus=gpus, installed=installed))
