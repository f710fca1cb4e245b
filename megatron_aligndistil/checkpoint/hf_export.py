"""A sharded model as a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.checkpoint.metadata import copy_metadata
from megatron_aligndistil.checkpoint.sources import INDEX, SINGLE
from megatron_aligndistil.checkpoint.staging import staged_folder
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models import families
from megatron_aligndistil.models.families.rules import Shape
from megatron_aligndistil.models.families.table import hf_shapes
from megatron_aligndistil.models.gathering import hf_tensors, n_bytes, split_by_bytes
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel.collectives import from_first_rank

MAX_SHARD_BYTES = 5 * 2**30

_SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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
                copy_metadata(metadata, staging, dtype, architecture.scalar_head)
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
    shards = split_by_bytes(shapes, dtype, max_bytes)
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
        total = sum(n_bytes(shape, dtype) for shape in shapes.values())
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return digests


def _header(shapes: dict[str, Shape], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file: its length (8 bytes, little-endian), then JSON padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + n_bytes(shape, dtype)
        entries[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
