"""A distributed checkpoint's index, read without running what it may contain, and its files checked against it.

Torch's reader unpickles the index, so a doctored one could run anything. Ours is read first, by an unpickler that knows
the descriptions of tensors and files and nothing else.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_aligndistil.errors import CheckpointError

INDEX = ".metadata"
_CONFIG = "metadata.json"
# State that isn't tensors: a file of its own, or (newer Megatron-Core) an object among the tensors.
_COMMON_FILE, _COMMON_OBJECT = "common.pt", "common_state"
_MODEL = ("embedding", "decoder", "output_layer", "score_head")

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
    index = read_index(folder)
    objects = {key for key, kept in index.state_dict_metadata.items() if isinstance(kept, BytesStorageMetadata)}
    has_common_object = any(key.split("/")[0] == _COMMON_OBJECT for key in objects)
    for name in (_CONFIG,) if has_common_object else (_CONFIG, _COMMON_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file; the checkpoint is incomplete")
    ends: dict[str, int] = {}
    for item in index.storage_data.values():
        if Path(item.relative_path).name != item.relative_path:
            raise CheckpointError(f"{folder / INDEX}: it refers to {item.relative_path}, outside its folder")
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            state = "no such file" if size < 0 else f"truncated to {size} of at least {end} bytes"
            raise CheckpointError(f"{path}: {state}; the checkpoint cannot be read")
    for key, item in index.storage_data.items():
        if key.fqn in objects:
            _check_object(folder / item.relative_path, key.fqn, item)


def _check_object(path: Path, name: str, item: Any) -> None:
    """Refuse an object that is more than plain values: Megatron-Core would unpickle it without a look."""
    try:
        if getattr(item, "transform_descriptors", None):
            raise ValueError("it is encoded")
        with path.open("rb") as file:
            file.seek(item.offset)
            torch.load(io.BytesIO(file.read(item.length)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: {name} is not plain values and is not read ({reason})") from error
