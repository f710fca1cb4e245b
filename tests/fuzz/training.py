"""Runs of the program's training in a rank of the harness: sound ones, and what they say of spoiled folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_aligndistil.config.checks import check
from megatron_aligndistil.config.compose import load_config
from megatron_aligndistil.launch import assemble
from megatron_aligndistil.parallel.setup import Layout, initialize, shutdown


def overrides(model: Path, data: Path, folder: Path, steps: int = 1) -> list[str]:
    """A run of ``steps`` steps of tiny batches into ``folder``/run, its tokenized data in ``folder``/cache."""
    given = {
        "model.restore_from_path": model,
        "model.data.data_prefix.train": f"[{data}]",
        "model.data.cache_dir": folder / "cache",
        "exp_manager.explicit_log_dir": folder / "run",
        "exp_manager.checkpoint_callback_params.async_save": "false",
        "model.encoder_seq_length": 192,
        "model.data.max_prompt_length": 96,
        "model.global_batch_size": 4,
        "trainer.precision": "32",
        "trainer.max_steps": steps,
        "trainer.val_after_training": "false",
    }
    return [f"{key}={value}" for key, value in given.items()]


@contextmanager
def own_groups() -> Iterator[None]:
    """Inside there are no groups yet, so that a command can start its own; afterwards there are some again."""
    if parallel_state.model_parallel_is_initialized():
        shutdown()
    try:
        yield
    finally:
        if not dist.is_initialized():
            initialize(Layout(), 0, "cpu")


def train(recipe: str, given: Sequence[str]) -> None:
    """A whole run in this rank."""
    config = load_config(recipe, given)
    check(config)
    with own_groups():
        assemble.run(config)
