"""The policy's weights as engines take them: whole tensors under Hugging Face names, on every rank, a bucket at a time.

The policy stays sharded: a rank holds one bucket, and rank 0 the tensor that is being gathered, beside its shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.models import families
from megatron_aligndistil.models.families.rules import Shape
from megatron_aligndistil.models.families.table import hf_shapes
from megatron_aligndistil.models.gathering import gathered_tensors, split_by_bytes
from megatron_aligndistil.models.policy import HiddenStateModel


@torch.no_grad()
def weight_buckets(
    chunks: Sequence[HiddenStateModel], dtype: torch.dtype, bucket_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Every weight once, in ``dtype``: consecutive tensors of at most ``bucket_bytes`` together, a larger one alone.

    Every rank of the world iterates it to its end and gets the same buckets, each by one broadcast from rank 0. The
    tensors are views of one buffer on the rank's device: the next bucket overwrites them.
    """
    architecture = chunks[0].architecture
    buckets = split_by_bytes(hf_shapes(families.table_of(architecture), architecture), dtype, bucket_bytes)
    largest = max(_elements(shapes) for shapes in buckets)
    buffer = torch.empty(largest, dtype=dtype, device=torch.cuda.current_device())
    tensors = gathered_tensors(chunks)
    for shapes in buckets:
        used = buffer[: _elements(shapes)]
        pieces = used.split([math.prod(shape) for shape in shapes.values()])
        bucket = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        for expected, view in bucket.items():
            name, tensor = next(tensors)
            if name != expected:
                raise AssertionError(f"{name} where {expected} was due")
            if tensor is not None:
                view.copy_(tensor)
        dist.broadcast(used, src=0)
        yield bucket


def _elements(shapes: dict[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
