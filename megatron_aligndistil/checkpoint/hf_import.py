"""Hugging Face weights into the shards of a layout, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from megatron_aligndistil.checkpoint.placement import Placed, placed_parameters
from megatron_aligndistil.checkpoint.sources import TensorSource
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models import families
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families.table import EMBEDDING, HEAD, hf_shapes
from megatron_aligndistil.models.policy import HiddenStateModel

# Buffers that old exports of Llama carry; they follow from the config.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_NAMES_SHOWN = 5


def load_hf(chunks: Sequence[HiddenStateModel], source: TensorSource) -> None:
    """Fill every parameter of this rank from ``source``; padded vocabulary rows become zero.

    Only the rank's slice of a tensor is read where the format allows it (safetensors). Values are cast to the
    parameters' dtype.

    Raises:
        CheckpointError: tensors are missing, superfluous or of another shape than the architecture's.
    """
    check_tensors(source, chunks[0].architecture)
    with torch.no_grad():
        for placed in placed_parameters(chunks):
            placed.parameter.copy_(_shard(placed, chunks[0].architecture, source))


def _shard(placed: Placed, architecture: Architecture, source: TensorSource) -> torch.Tensor:
    parts = [source.part(name) for name in placed.entry.hf_shapes(architecture, placed.layer)]
    shard = placed.entry.rule.split(parts, placed.slot)
    if tuple(shard.shape) != placed.slot.shape:
        raise AssertionError(f"{placed.key}: shard {tuple(shard.shape)} for a parameter {placed.slot.shape}")
    return shard


def check_tensors(source: TensorSource, architecture: Architecture) -> None:
    """Refuse a source whose tensors are not exactly those of ``architecture``.

    Raises:
        CheckpointError: names what is missing, superfluous or of another shape.
    """
    expected = hf_shapes(families.table_of(architecture), architecture)
    found = {name: shape for name, shape in source.shapes.items() if not _DERIVED.fullmatch(name)}
    if architecture.tied_embeddings:
        _check_tied_head(source, found)
    if missing := expected.keys() - found.keys():
        raise CheckpointError(f"{source.origin}: tensors missing: {_some(missing)}")
    if superfluous := found.keys() - expected.keys():
        raise CheckpointError(
            f"{source.origin}: tensors that a {architecture.family} model doesn't have: {_some(superfluous)}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{source.origin}: {name} has shape {list(found[name])}, but config.json says {list(shape)}"
            )


def _check_tied_head(source: TensorSource, found: dict[str, tuple[int, ...]]) -> None:
    """Drop a head that is the embedding again (some exports write both), refuse another one."""
    head, embedding = HEAD.parts[0][0], EMBEDDING.parts[0][0]
    if head not in found or embedding not in found:
        return
    rows = found.pop(head)[0]
    if rows != found[embedding][0] or not torch.equal(
        source.part(head).take(0, 0, rows), source.part(embedding).take(0, 0, rows)
    ):
        raise CheckpointError(
            f"{source.origin}: {head} differs from {embedding}, but config.json says tie_word_embeddings: true; "
            "set it to false"
        )


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMES_SHOWN} more" if len(ordered) > _NAMES_SHOWN else ""
    return ", ".join(ordered[:_NAMES_SHOWN]) + more
