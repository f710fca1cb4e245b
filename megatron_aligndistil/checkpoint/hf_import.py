"""Hugging Face weights into the shards of a layout, one tensor at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from megatron_aligndistil.checkpoint.sources import TensorSource
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models import families
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families.table import EMBEDDING, HEAD, SCALAR_HEAD, hf_shapes
from megatron_aligndistil.models.heads import draw_scalar_head
from megatron_aligndistil.models.placement import Placed, placed_parameters
from megatron_aligndistil.models.policy import HiddenStateModel

logger = logging.getLogger(__name__)

HEAD_SEED = 1234  # of a scalar head that is drawn
LM_HEAD, SCORE = HEAD.parts[0][0], SCALAR_HEAD.parts[0][0]

# Buffers that old exports of Llama carry; they follow from the config.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_NAMES_SHOWN = 5


def load_hf(chunks: Sequence[HiddenStateModel], source: TensorSource, head_seed: int = HEAD_SEED) -> None:
    """Fill every parameter of this rank from ``source``; padded vocabulary rows become zero.

    A scalar head that the source doesn't have, because it is a language model, is drawn with ``head_seed``.

    Only the rank's slice of a tensor is read where the format allows it (safetensors). Values are cast to the
    parameters' dtype.

    Raises:
        CheckpointError: tensors are missing, superfluous or of another shape than the architecture's.
    """
    architecture = chunks[0].architecture
    check_tensors(source, architecture)
    drawn = architecture.scalar_head and SCORE not in source.shapes
    with torch.no_grad():
        for placed in placed_parameters(chunks):
            if not (drawn and placed.entry is SCALAR_HEAD):
                placed.parameter.copy_(_shard(placed, architecture, source))
    if drawn:
        draw_head(chunks, source.origin, head_seed)


def draw_head(chunks: Sequence[HiddenStateModel], origin: Path, seed: int) -> None:
    """Fill the scalar head of a model whose other weights came from ``origin``, which has none; says so in the log."""
    for placed in placed_parameters(chunks):
        if placed.entry is SCALAR_HEAD:
            draw_scalar_head(placed.parameter, seed)
    logger.info("%s: a language model; its head is left out and a scalar head is drawn (seed %d)", origin, seed)


def _shard(placed: Placed, architecture: Architecture, source: TensorSource) -> torch.Tensor:
    parts = [source.part(name) for name in placed.entry.hf_shapes(architecture, placed.layer)]
    shard = placed.entry.rule.split(parts, placed.slot)
    if tuple(shard.shape) != placed.slot.shape:
        raise AssertionError(f"{placed.key}: shard {tuple(shard.shape)} for a parameter {placed.slot.shape}")
    return shard


def check_tensors(source: TensorSource, architecture: Architecture) -> None:
    """Refuse a source whose tensors are not exactly those of ``architecture``.

    For a scalar head they may also be a language model's, whose head is passed over.

    Raises:
        CheckpointError: names what is missing, superfluous or of another shape.
    """
    expected = hf_shapes(families.table_of(architecture), architecture)
    found = {name: shape for name, shape in source.shapes.items() if not _DERIVED.fullmatch(name)}
    if architecture.scalar_head and SCORE not in found:
        del expected[SCORE]
        found.pop(LM_HEAD, None)
    elif not architecture.scalar_head and SCORE in found:
        raise not_a_language_model(source.origin)
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


def not_a_language_model(origin: Path) -> CheckpointError:
    """The refusal of a reward model's weights for a language model."""
    return CheckpointError(f"{origin}: a reward model's weights (a scalar head); a language model is wanted here")


def _check_tied_head(source: TensorSource, found: dict[str, tuple[int, ...]]) -> None:
    """Drop a head that is the embedding again (some exports write both), refuse another one."""
    head, embedding = LM_HEAD, EMBEDDING.parts[0][0]
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
