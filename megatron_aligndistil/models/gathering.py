"""The shards of a layout as Hugging Face tensors, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.models import families
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families.lora import lora_table
from megatron_aligndistil.models.families.rules import Shape
from megatron_aligndistil.models.families.table import Entry, lines
from megatron_aligndistil.models.lora import Adapter, LoRASettings, merged, placed_adapter, updates
from megatron_aligndistil.models.placement import Placed, placed_parameters
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import groups

Value = Callable[[Tensor], Tensor]
Line = tuple[Entry, int | None]


def _data(parameter: Tensor) -> Tensor:
    return parameter.data


@torch.no_grad()
def gathered_tensors(
    chunks: Sequence[HiddenStateModel], value: Value | None = None
) -> Iterator[tuple[str, Tensor | None]]:
    """Full tensors by Hugging Face name, in the order of a forward pass: on global rank 0; None on every other rank.

    Every rank iterates it to its end and gets the same names, so collectives of the caller's own may come between two
    tensors. ``value`` picks what is gathered of a parameter, such as a gradient of the same shape; by default its data,
    with the active adapter merged. A tied head appears once, as the embedding.
    """
    architecture = chunks[0].architecture
    everything = list(lines(families.table_of(architecture), architecture))
    updating = {} if value else {id(w): adapter for chunk in chunks for w, adapter in updates(chunk).items()}
    yield from _gathered(architecture, everything, placed_parameters(chunks), value or _data, updating)


@torch.no_grad()
def gathered_adapter(
    chunks: Sequence[HiddenStateModel], name: str, value: Value = _data
) -> Iterator[tuple[str, Tensor | None]]:
    """An adapter's full tensors by Hugging Face name, as ``gathered_tensors``."""
    architecture, settings = chunks[0].architecture, chunks[0].adapters.settings[name]
    yield from _gathered(architecture, adapter_lines(settings, architecture), placed_adapter(chunks, name), value, {})


def adapter_lines(settings: LoRASettings, architecture: Architecture) -> list[Line]:
    """Every (entry, layer) of an adapter, in the order of a forward pass."""
    table = lora_table(settings.targets, settings.rank)
    return [(entry, layer) for layer in range(architecture.num_layers) for entry in table]


def _gathered(
    architecture: Architecture,
    order: Sequence[Line],
    placed: Iterable[Placed],
    value: Value,
    updating: Mapping[int, Adapter],
) -> Iterator[tuple[str, Tensor | None]]:
    if dist.get_global_rank(groups.model().group, 0) != 0:
        # Another replica of the same weights, data-parallel or context-parallel.
        yield from ((name, None) for entry, layer in order for name in entry.hf_shapes(architecture, layer))
        return
    held = {one.key: one for one in placed}
    stages: list[Any] = [None] * groups.pipeline().size
    dtypes = {key: value(one.parameter).dtype for key, one in held.items()}
    dist.all_gather_object(stages, dtypes, group=groups.pipeline().group)
    for entry, layer in order:
        key = entry.parameter, layer
        owner = next(stage for stage, names in enumerate(stages) if key in names)
        shapes = entry.hf_shapes(architecture, layer)
        pieces = None
        if owner == groups.pipeline().rank:
            shard = value(held[key].parameter)
            if adapter := updating.get(id(held[key].parameter)):
                shard = merged(shard, adapter)
            pieces = _merged(held[key], shard.contiguous(), list(shapes.values()))
        if groups.tensor().rank == 0:
            yield from _delivered(shapes, pieces, owner, stages[owner][key])
        else:
            yield from ((name, None) for name in shapes)


def hf_tensors(chunks: Sequence[HiddenStateModel], value: Value | None = None) -> Iterator[tuple[str, Tensor]]:
    """``gathered_tensors`` on global rank 0, nothing on the others; every rank iterates it to its end."""
    for name, tensor in gathered_tensors(chunks, value):
        if tensor is not None:
            yield name, tensor


def _merged(placed: Placed, shard: Tensor, shapes: list[Shape]) -> list[Tensor] | None:
    """The Hugging Face tensors on the first tensor-parallel rank, None on the others."""
    axis, shards = groups.tensor(), [shard]
    if placed.entry.rule.sharded and axis.size > 1:
        shards = [torch.empty_like(shard) for _ in range(axis.size)] if axis.rank == 0 else []
        first = dist.get_global_rank(axis.group, 0)
        dist.gather(shard, shards or None, dst=first, group=axis.group)
    return placed.entry.rule.merge(shards, shapes, placed.slot.query_groups) if axis.rank == 0 else None


def _delivered(
    shapes: dict[str, Shape], merged: list[Tensor] | None, owner: int, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor | None]]:
    """Hand tensors from the stage that owns them to global rank 0; on that rank yield them, on the others None."""
    axis = groups.pipeline()
    for index, (name, shape) in enumerate(shapes.items()):
        tensor = merged[index] if merged is not None else None
        if owner != 0 and axis.rank == owner and tensor is not None:
            dist.send(tensor.contiguous(), dst=dist.get_global_rank(axis.group, 0), group=axis.group)
        if axis.rank == 0 and tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
            dist.recv(tensor, src=dist.get_global_rank(axis.group, owner), group=axis.group)
        yield name, tensor if axis.rank == 0 else None


def split_by_bytes(shapes: Mapping[str, Shape], dtype: torch.dtype, max_bytes: int) -> list[dict[str, Shape]]:
    """Runs of consecutive tensors of at most ``max_bytes`` together (a larger tensor stands alone)."""
    runs: list[dict[str, Shape]] = [{}]
    room = max_bytes
    for name, shape in shapes.items():
        size = n_bytes(shape, dtype)
        if size > room and runs[-1]:
            runs.append({})
            room = max_bytes
        runs[-1][name] = shape
        room -= size
    return runs


def n_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of a tensor of this shape."""
    return math.prod(shape) * dtype.itemsize
