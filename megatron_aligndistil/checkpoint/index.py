"""A distributed checkpoint's index, read without running what it may contain, and its files checked against it.

Torch's reader unpickles the index, so a doctored one could run anything. Ours is read first, by an unpickler that knows
the descriptions of tensors and files and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_aligndistil.errors import CheckpointError

INDEX = ".metadata"
_COMPANIONS = ("common.pt", "metadata.json")
_MODEL = ("embedding", "decoder", "output_layer")

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_KNOWN = {
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *((_METADATA, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    *((_PLANNER, name) for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which has no place there")


def read_index(folder: Path) -> Any:
    """The index of a distributed checkpoint (torch's ``Metadata``).

    Raises:
        CheckpointError: it is missing, damaged or doctored.
    """
    try:
        with (folder / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
        if index.storage_data is None:
            raise ValueError("it lists no files")
        return index
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder / INDEX}: no such file; the checkpoint is incomplete") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX}: not a checkpoint's index ({error})") from error


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtypes of the model's parameters in a distributed checkpoint, by Megatron-Core's names.

    Raises:
        CheckpointError: as ``read_index``.
    """
    tensors = read_index(folder).state_dict_metadata
    return {name: t.properties.dtype for name, t in tensors.items() if name.split(".")[0] in _MODEL}


def check_files(folder: Path) -> None:
    """Refuse a distributed checkpoint whose index is damaged or doctored, or whose files are missing or cut short.

    Raises:
        CheckpointError: names the file.
    """
    for name in _COMPANIONS:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file; the checkpoint is incomplete")
    ends: dict[str, int] = {}
    for item in read_index(folder).storage_data.values():
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    for name, end in ends.items():
        path = folder / Path(name).name
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            state = "no such file" if size < 0 else f"truncated to {size} of at least {end} bytes"
            raise CheckpointError(f"{path}: {state}; the checkpoint cannot be read")
