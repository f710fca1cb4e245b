"""The shards of a layout as Hugging Face tensors, one at a time; and as a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.checkpoint.metadata import copy_metadata
from megatron_aligndistil.checkpoint.placement import Placed, placed_parameters
from megatron_aligndistil.checkpoint.sources import INDEX, SINGLE
from megatron_aligndistil.checkpoint.staging import staged_folder
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models import families
from megatron_aligndistil.models.families.rules import Shape
from megatron_aligndistil.models.families.table import hf_shapes, lines
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import groups
from megatron_aligndistil.parallel.collectives import from_first_rank

MAX_SHARD_BYTES = 5 * 2**30

_SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _data(parameter: Tensor) -> Tensor:
    return parameter.data


@torch.no_grad()
def hf_tensors(
    chunks: Sequence[HiddenStateModel], value: Callable[[Tensor], Tensor] = _data
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors under their Hugging Face names, in the order of a forward pass, yielded on global rank 0 alone.

    Every rank iterates it to its end (the others get nothing, but take part). ``value`` picks what is gathered of a
    parameter: its data, or a gradient of the same shape. A tied head appears once, as the embedding.
    """
    if dist.get_global_rank(groups.model().group, 0) != 0:
        return  # another data-parallel replica of the same weights
    architecture = chunks[0].architecture
    held = {placed.key: placed for placed in placed_parameters(chunks)}
    stages: list[Any] = [None] * groups.pipeline().size
    dtypes = {key: value(placed.parameter).dtype for key, placed in held.items()}
    dist.all_gather_object(stages, dtypes, group=groups.pipeline().group)
    for entry, layer in lines(families.table_of(architecture), architecture):
        key = entry.parameter, layer
        owner = next(stage for stage, names in enumerate(stages) if key in names)
        shapes = entry.hf_shapes(architecture, layer)
        merged = None
        if owner == groups.pipeline().rank:
            merged = _merged(held[key], value, list(shapes.values()))
        if groups.tensor().rank == 0:
            yield from _delivered(shapes, merged, owner, stages[owner][key])


def _merged(placed: Placed, value: Callable[[Tensor], Tensor], shapes: list[Shape]) -> list[Tensor] | None:
    """The Hugging Face tensors on the first tensor-parallel rank, None on the others."""
    axis, shard = groups.tensor(), value(placed.parameter).contiguous()
    shards = [shard]
    if placed.entry.rule.sharded and axis.size > 1:
        shards = [torch.empty_like(shard) for _ in range(axis.size)] if axis.rank == 0 else []
        first = dist.get_global_rank(axis.group, 0)
        dist.gather(shard, shards or None, dst=first, group=axis.group)
    return placed.entry.rule.merge(shards, shapes, placed.slot.query_groups) if axis.rank == 0 else None


def _delivered(
    shapes: dict[str, Shape], merged: list[Tensor] | None, owner: int, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Hand tensors from the stage that owns them to global rank 0, and yield them there."""
    axis = groups.pipeline()
    for index, (name, shape) in enumerate(shapes.items()):
        tensor = merged[index] if merged is not None else None
        if owner != 0 and axis.rank == owner and tensor is not None:
            dist.send(tensor.contiguous(), dst=dist.get_global_rank(axis.group, 0), group=axis.group)
        if axis.rank != 0:
            continue
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
            dist.recv(tensor, src=dist.get_global_rank(axis.group, owner), group=axis.group)
        yield name, tensor


def export_hf(
    chunks: Sequence[HiddenStateModel],
    metadata: Path,
    output: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write a Hugging Face folder: safetensors in ``dtype`` with config, tokenizer and template of ``metadata``.

    Every rank calls it. The folder appears complete or not at all. Tensors are written as they arrive, so that memory
    holds one of them beside the model. Returns the SHA-256 of each tensor's bytes on rank 0, nothing elsewhere.

    Raises:
        CheckpointError: ``output`` exists, or cannot be written.
    """
    architecture = chunks[0].architecture
    shapes = hf_shapes(families.table_of(architecture), architecture)
    digests: dict[str, str] = {}
    failure = None
    with staged_folder(output) as staging:
        tensors = hf_tensors(chunks)
        if dist.get_rank() == 0:
            try:
                digests = _write_folder(tensors, shapes, staging, dtype, max_shard_bytes)
                copy_metadata(metadata, staging, dtype)
            except OSError as error:
                failure = f"{output}: cannot write: {error.strerror or error}"
        for _ in tensors:
            pass  # after a failure, the other ranks still send
        if failure := from_first_rank(failure):
            raise CheckpointError(failure)
    return digests


def _write_folder(
    tensors: Iterator[tuple[str, Tensor]], shapes: dict[str, Shape], folder: Path, dtype: torch.dtype, max_bytes: int
) -> dict[str, str]:
    """Write the safetensors files (and their index, where there are several) of tensors that come in order."""
    shards = _shards(shapes, dtype, max_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE]
    digests: dict[str, str] = {}
    for name, shard in zip(files, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard, dtype))
            for expected in shard:
                found, tensor = next(tensors)
                if (found, tuple(tensor.shape)) != (expected, shapes[expected]):
                    raise AssertionError(f"{found} {tuple(tensor.shape)} where {expected} {shapes[expected]} was due")
                data = tensor.to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy().data
                digests[expected] = hashlib.sha256(data).hexdigest()
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(_n_bytes(shape, dtype) for shape in shapes.values())
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return digests


def _shards(shapes: dict[str, Shape], dtype: torch.dtype, max_bytes: int) -> list[dict[str, Shape]]:
    """Consecutive tensors of at most ``max_bytes`` together (a larger tensor stands alone)."""
    shards: list[dict[str, Shape]] = [{}]
    room = max_bytes
    for name, shape in shapes.items():
        size = _n_bytes(shape, dtype)
        if size > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = shape
        room -= size
    return shards


def _header(shapes: dict[str, Shape], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file: its length (8 bytes, little-endian), then JSON padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _n_bytes(shape, dtype)
        entries[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _n_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
