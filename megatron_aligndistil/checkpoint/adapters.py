"""LoRA adapters into the shards of a layout, and out of them as PEFT folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from megatron_aligndistil.checkpoint.adapter_config import (
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    SavedAdapter,
    peft_config,
)
from megatron_aligndistil.checkpoint.hf_import import SCORE
from megatron_aligndistil.checkpoint.sources import SafetensorsFolder
from megatron_aligndistil.checkpoint.staging import staged_folder
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.families.rules import MemoryPart, Part
from megatron_aligndistil.models.families.table import LAYER, SCALAR_HEAD
from megatron_aligndistil.models.gathering import gathered_adapter, hf_tensors
from megatron_aligndistil.models.lora import TRAINED, placed_adapter
from megatron_aligndistil.models.placement import placed_parameters
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel.collectives import from_first_rank


def adapter_state(chunk: HiddenStateModel, name: str) -> dict[str, Any]:
    """Megatron-Core's sharded state of an adapter: the parameters themselves, under names without the adapter's own."""
    state: dict[str, Any] = {}
    for placed in placed_adapter([chunk], name):
        module, parameter = placed.entry.parameter.replace(LAYER, str(placed.layer)).rsplit(".", 1)
        key = f"{module}.adapter.{parameter}"
        if placed.dimension is None:
            state[key] = make_sharded_tensor_for_checkpoint(placed.parameter, key)
        else:
            state[key] = make_tp_sharded_tensor_for_checkpoint(placed.parameter, key, tp_axis=placed.dimension)
    return state


def open_peft(folder: Path) -> SafetensorsFolder:
    """The tensors of a PEFT folder.

    Raises:
        CheckpointError: its file is missing or unreadable.
    """
    return SafetensorsFolder(folder, PEFT_WEIGHTS, PEFT_PREFIX)


@torch.no_grad()
def load_peft(chunks: Sequence[HiddenStateModel], name: str, saved: SavedAdapter) -> None:
    """Fill an attached adapter, and a scalar head where the folder brings one, from a PEFT folder.

    What the folder doesn't update of a fused projection (keys where it has queries and values) stays zero.

    Raises:
        CheckpointError: a tensor has another shape than the model's.
    """
    source = open_peft(saved.path)
    architecture = chunks[0].architecture

    def part(tensor: str, shape: tuple[int, ...]) -> Part:
        if tensor not in source.shapes:
            return MemoryPart(torch.zeros(shape))
        if source.shapes[tensor] != shape:
            raise CheckpointError(
                f"{saved.path / PEFT_WEIGHTS}: {tensor} has shape {list(source.shapes[tensor])}, "
                f"but rank and base model say {list(shape)}"
            )
        return source.part(tensor)

    for placed in placed_adapter(chunks, name):
        shapes = placed.entry.hf_shapes(architecture, placed.layer)
        parts = [part(tensor, shape) for tensor, shape in shapes.items()]
        placed.parameter.copy_(placed.entry.rule.split(parts, placed.slot))
    if saved.scalar:
        for head in (one for one in placed_parameters(chunks) if one.entry is SCALAR_HEAD):
            head.parameter.copy_(head.entry.rule.split([part(SCORE, head.slot.shape)], head.slot))


def export_peft(chunks: Sequence[HiddenStateModel], base: Path, output: Path) -> None:
    """Write the adapter under training, and a scalar head, as a PEFT folder over the model ``base``.

    Every rank calls it.

    Raises:
        CheckpointError: ``output`` exists, or cannot be written.
    """
    architecture, settings = chunks[0].architecture, chunks[0].adapters.settings[TRAINED]
    tensors: dict[str, Tensor] = {
        f"{PEFT_PREFIX}{name}": tensor.cpu().contiguous()
        for name, tensor in gathered_adapter(chunks, TRAINED)
        if tensor is not None
    }
    if architecture.scalar_head:
        head = {name: tensor.cpu() for name, tensor in hf_tensors(chunks) if name == SCORE}
        tensors |= {f"{PEFT_PREFIX}{name}": tensor.contiguous() for name, tensor in head.items()}
    failure = None
    with staged_folder(output) as staging:
        if dist.get_rank() == 0:
            try:
                save_file(tensors, staging / PEFT_WEIGHTS, metadata={"format": "pt"})
                config = peft_config(settings, base, architecture.scalar_head)
                (staging / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            except OSError as error:
                failure = f"{output}: cannot write: {error.strerror or error}"
        if failure := from_first_rank(failure):
            raise CheckpointError(failure)
