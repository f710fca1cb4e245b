"""How the ops trade memory for time, and how they cut a call into tiles of logits.

A tile is a chunk of tokens by some of the shard's columns; nothing larger than a chunk's logits ever exists in the
statistics' precision.

Shapes: T tokens, C tokens of one chunk, V true vocabulary entries of this shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_aligndistil.config.base_schema import KernelConfig

MIB = 1 << 20


@dataclass(frozen=True)
class KernelSettings:
    """``model.kernel``.

    plan             store (S): the gradient of the logits is formed in the forward pass and kept [T, V] in the
                     operands' type, 5 head products a step with two teachers; recompute (R): the backward pass makes
                     the logits again, 8 products and no such tensor; auto: S where it fits the workspace, R otherwise
    workspace_bytes  what a call may hold beside its inputs and results; None: the device's default
    chunk_tokens     tokens of a chunk; None: as the plan and the device like it
    backend          auto: Triton on a GPU and compiled loops on a CPU where they can be had, PyTorch otherwise
    """

    plan: Literal["auto", "store", "recompute"] = "auto"
    workspace_bytes: int | None = None
    chunk_tokens: int | None = None
    backend: Literal["auto", "pytorch", "native", "triton"] = "auto"

    @classmethod
    def of(cls, config: KernelConfig) -> KernelSettings:
        """From the configuration, which has been checked."""
        workspace = None if config.workspace_mib is None else config.workspace_mib * MIB
        return cls(config.plan, workspace, config.chunk_tokens, config.backend)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Habits:
    """What suits a device.

    workspace_bytes  a call's memory
    stored_chunk     tokens of a chunk under S, whose logits exist over all columns
    chunk            tokens of a chunk under R
    tile_elements    logits of one model in a tile: on a CPU what its caches hold, on a GPU no limit but the workspace
    stored_columns   columns at a time of S's backward pass, over all tokens
    """

    workspace_bytes: int
    stored_chunk: int
    chunk: int
    tile_elements: int | None
    stored_columns: int


HABITS = {
    "cpu": Habits(workspace_bytes=1024 * MIB, stored_chunk=128, chunk=1024, tile_elements=1 << 19, stored_columns=2048),
    "cuda": Habits(workspace_bytes=4096 * MIB, stored_chunk=1024, chunk=2048, tile_elements=None, stored_columns=16384),
}


@dataclass(frozen=True)
class Size:
    """A call.

    tokens, columns                 T, and the columns of a shard with its padding
    device                          a key of ``HABITS``
    models, kept                    whose logits a tile has, and how many of them the gradient takes
    operand_bytes, statistic_bytes  of one number
    """

    tokens: int
    columns: int
    device: str
    models: int
    kept: int
    operand_bytes: int
    statistic_bytes: int


@dataclass(frozen=True)
class Tiling:
    """The chosen plan, the tiles' size, and the columns at a time of S's backward pass."""

    stored: bool
    chunk_tokens: int
    tile_columns: int
    stored_columns: int

    @classmethod
    def choose(cls, settings: KernelSettings, size: Size, wants_gradient: bool) -> Tiling:
        """S, where the gradient [T, V] in the operands' type and a chunk's logits fit the workspace, else R; and R's
        single sweep where nobody wants a gradient."""
        if settings.chunk_tokens is not None and settings.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {settings.chunk_tokens}")
        habits = HABITS[size.device]
        workspace = settings.workspace_bytes or habits.workspace_bytes
        columns = max(1, size.columns)
        chunk = max(1, min(size.tokens, settings.chunk_tokens or habits.stored_chunk))
        held = columns * (size.tokens * size.operand_bytes + chunk * size.kept * size.statistic_bytes)
        stored = wants_gradient and (settings.plan == "store" or (settings.plan == "auto" and held <= workspace))
        if not stored:
            chunk = max(1, min(size.tokens, settings.chunk_tokens or habits.chunk))
        return cls._of(stored, chunk, workspace, size)

    @classmethod
    def resident(cls, settings: KernelSettings, size: Size) -> Tiling:
        """A chunk's logits over all columns at once, of as many tokens as the workspace takes."""
        habits = HABITS[size.device]
        workspace = settings.workspace_bytes or habits.workspace_bytes
        columns = max(1, size.columns)
        room = workspace // (columns * size.kept * size.statistic_bytes)
        chunk = max(1, min(size.tokens, settings.chunk_tokens or min(habits.stored_chunk, room)))
        return cls._of(True, chunk, workspace, size)

    @classmethod
    def _of(cls, stored: bool, chunk: int, workspace: int, size: Size) -> Tiling:
        habits = HABITS[size.device]
        elements = habits.tile_elements or workspace // (size.models * size.statistic_bytes)
        return cls(stored, chunk, max(1, min(size.columns, elements // chunk)), habits.stored_columns)


def slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step``."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def device_type(tensor: torch.Tensor) -> str:
    """The key of ``HABITS``."""
    return "cuda" if tensor.is_cuda else "cpu"
