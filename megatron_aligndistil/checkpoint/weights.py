"""Model weights in every form that a path can name, into the shards of any layout; and Megatron-Core's form back out.

The distributed checkpoint holds global tensors under global names, so it has no layout of its own.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_aligndistil.checkpoint.adapter_config import SavedAdapter
from megatron_aligndistil.checkpoint.adapters import adapter_state, load_peft, open_peft
from megatron_aligndistil.checkpoint.hf_import import HEAD_SEED, draw_head, load_hf, not_a_language_model
from megatron_aligndistil.checkpoint.index import check_files, stored_dtypes
from megatron_aligndistil.checkpoint.locate import WEIGHTS, kind_of, model_path, saved_adapter
from megatron_aligndistil.checkpoint.metadata import read_config
from megatron_aligndistil.checkpoint.sources import GGUFFile, SafetensorsFolder, TensorSource
from megatron_aligndistil.errors import REASON_CHARACTERS, CheckpointError
from megatron_aligndistil.models.families.rules import VOCAB
from megatron_aligndistil.models.families.table import SCALAR_HEAD
from megatron_aligndistil.models.lora import TRAINED, attach, merge
from megatron_aligndistil.models.placement import placed_parameters
from megatron_aligndistil.models.policy import HiddenStateModel

# Layers under their own names, not stacked along an axis; pass a copy, Megatron-Core adds its process groups.
SHARDING = {"non_homogeneous_layers": True}

_FAILURES = (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError, CheckpointingException)


def open_source(path: Path) -> TensorSource:
    """The tensors of a Hugging Face folder or a GGUF file.

    Raises:
        CheckpointError: unreadable files.
    """
    return GGUFFile(path, read_config(path)) if path.is_file() else SafetensorsFolder(path)


def check_weights(path: str | Path) -> None:
    """Look for every file of the weights at ``path``, and of an adapter's base, without reading them.

    Raises:
        CheckpointError: names the file that is missing, cut short or doctored.
    """
    found = model_path(path)
    if saved := saved_adapter(found):
        check_weights(saved.base)
    if kind_of(found) == "megatron":
        check_files(found / WEIGHTS)
    elif kind_of(found) == "peft":
        open_peft(found)
    else:
        open_source(found)


def load_weights(chunks: Sequence[HiddenStateModel], path: str | Path, head_seed: int = HEAD_SEED) -> None:
    """Fill every parameter of this rank from a Hugging Face folder, a GGUF file, a Megatron checkpoint or a run.

    Every rank calls it. Values are cast to the parameters' dtype; padded vocabulary rows become zero. A model with a
    scalar head takes a language model's weights too: the head is then drawn with ``head_seed``, alike in every layout.
    The path of an adapter gives its base, the adapter merged.

    Raises:
        CheckpointError: names the file that is missing, damaged or doesn't fit the model.
    """
    found = model_path(path)
    if saved := saved_adapter(found):
        load_weights(chunks, saved.base, head_seed)
        load_adapter(chunks, TRAINED, saved)
        merge(chunks)
    elif kind_of(found) == "megatron":
        _load_megatron(chunks, found, head_seed)
    else:
        load_hf(chunks, open_source(found), head_seed)
    _refuse_nonfinite(chunks, found)


@torch.no_grad()
def _refuse_nonfinite(chunks: Sequence[HiddenStateModel], path: Path) -> None:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not torch.isfinite(parameter).all():
                raise CheckpointError(
                    f"{path}: {name} is not finite: the model holds NaN or infinity; take another, or an earlier "
                    "checkpoint of it"
                )


def load_adapter(chunks: Sequence[HiddenStateModel], name: str, saved: SavedAdapter) -> None:
    """Lay a saved adapter over the chunks, which have its base's weights. A scalar head of its own replaces theirs.

    Every rank calls it.

    Raises:
        CheckpointError: names the file that is missing, damaged or doesn't fit the base.
    """
    attach(chunks, name, saved.settings)
    if saved.form == "peft":
        load_peft(chunks, name, saved)
    else:
        _load_in_place(_adapted_state(chunks, name, saved.scalar), saved.path / WEIGHTS)


def _load_megatron(chunks: Sequence[HiddenStateModel], checkpoint: Path, head_seed: int) -> None:
    folder, scalar = checkpoint / WEIGHTS, chunks[0].architecture.scalar_head
    if (SCALAR_HEAD.parameter in stored_dtypes(folder)) == scalar:
        load_in_place(chunks, folder)
        return
    if not scalar:
        raise not_a_language_model(checkpoint)
    state = model_state(chunks)
    for tensors in state.values():
        tensors.pop(SCALAR_HEAD.parameter, None)
    _load_in_place(state, folder)
    _clear_padding(chunks)
    draw_head(chunks, checkpoint, head_seed)


def load_in_place(chunks: Sequence[HiddenStateModel], folder: Path) -> None:
    """Fill every parameter of this rank from a distributed checkpoint. Every rank calls it.

    Raises:
        CheckpointError: as ``load_distributed``.
    """
    _load_in_place(model_state(chunks), folder)
    _clear_padding(chunks)


def save_weights(chunks: Sequence[HiddenStateModel], folder: Path) -> None:
    """Write ``folder``/weights, a distributed checkpoint of the chunks. Every rank calls it.

    Raises:
        CheckpointError: a rank cannot write.
    """
    save_distributed(model_state(chunks), folder / WEIGHTS)


def model_state(chunks: Sequence[HiddenStateModel]) -> dict[str, Any]:
    """Megatron-Core's sharded state of the chunks: {"model": ...}, or {"model0": ..., "model1": ...} for several.

    Of chunks with adapters it is that of the one under training, and of a scalar head: the base has files of its own.
    Its tensors are the parameters themselves. Transformer Engine's extra states (FP8 scales) are left out: they would
    be unpickled on loading, and checkpoints are the same with and without it this way.
    """
    if chunks[0].adapters is not None:
        return _adapted_state(chunks, TRAINED, chunks[0].architecture.scalar_head)
    return {_part_of(index, chunks): _base_state(chunk) for index, chunk in enumerate(chunks)}


def _adapted_state(chunks: Sequence[HiddenStateModel], name: str, with_head: bool) -> dict[str, Any]:
    state = {}
    for index, chunk in enumerate(chunks):
        base = _base_state(chunk) if with_head else {}
        head = {key: value for key, value in base.items() if key == SCALAR_HEAD.parameter}
        state[_part_of(index, chunks)] = {**adapter_state(chunk, name), **head}
    return state


def _part_of(index: int, chunks: Sequence[HiddenStateModel]) -> str:
    return "model" if len(chunks) == 1 else f"model{index}"


def _base_state(chunk: HiddenStateModel) -> dict[str, Any]:
    sharded = chunk.sharded_state_dict(metadata=dict(SHARDING))
    kept = {name: value for name, value in sharded.items() if not isinstance(value, ShardedObject)}
    for name, value in kept.items():
        if name.startswith("output_layer."):
            # As for the embedding: another layout may pad the vocabulary to another size.
            value.allow_shape_mismatch = True
    return kept


def save_distributed(state: dict[str, Any], folder: Path) -> None:
    """Write a sharded state by Megatron-Core's ``dist_checkpointing``. Every rank calls it.

    Raises:
        CheckpointError: a rank cannot write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(state, str(folder))
    except (*_FAILURES, CheckpointException) as error:
        # A full disk shows as many different errors, or as none on the other ranks.
        free = shutil.disk_usage(folder.parent.parent).free / 2**30  # the nearest that rank 0 does not remove
        raise CheckpointError(
            f"{folder}: cannot write the checkpoint: {reason(error)}; {free:.2f} GiB are free there"
        ) from error


def load_distributed(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read what ``state`` describes by Megatron-Core's ``dist_checkpointing``. Every rank calls it.

    Raises:
        CheckpointError: a file is missing, cut short or not a checkpoint's, or the tensors don't fit.
    """
    check_files(folder)
    try:
        return dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:  # damage shows as any of the errors of three libraries
        raise CheckpointError(f"{folder}: cannot read the checkpoint: {reason(error)}") from error


def _load_in_place(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of ``state``, without a second copy of any."""
    targets: dict[tuple[str, str], Tensor] = {}
    for key, sharded in state.items():
        for name, value in sharded.items():
            targets[key, name] = value.data
            if isinstance(value, ShardedTensorFactory):
                # Its pieces are views of the parameter; joining them would make a copy.
                value.merge_fn = list
    loaded = load_distributed(state, folder)
    for (key, name), target in targets.items():
        _settle(target, loaded[key][name])


@torch.no_grad()
def _settle(target: Tensor, loaded: Tensor | list[Tensor]) -> None:
    pieces = loaded if isinstance(loaded, list) else [loaded]
    for piece, view in zip(pieces, target.split([len(piece) for piece in pieces]), strict=True):
        if piece.data_ptr() != view.data_ptr():
            view.copy_(piece)


@torch.no_grad()
def _clear_padding(chunks: Sequence[HiddenStateModel]) -> None:
    vocab_size = chunks[0].architecture.vocab_size
    for placed in placed_parameters(chunks):
        if placed.entry.rule is VOCAB:
            first = placed.slot.rank * placed.slot.shape[0]
            placed.parameter[max(0, vocab_size - first) :] = 0


def reason(error: BaseException) -> str:
    """The first line that says something of an error that may hold one a rank."""
    causes: Iterator[BaseException] = iter([error])
    if isinstance(error, CheckpointException):
        causes = (failure[0] for failure in error.failures.values())
    lines = (line for cause in causes for line in str(cause).splitlines() if line.strip())
    # Torch goes on to explain how to run a pickle all the same.
    return next(lines, "another process failed").partition(". In PyTorch")[0][:REASON_CHARACTERS]
