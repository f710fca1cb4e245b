"""A distributed checkpoint's index, read without running what it may contain, and its files checked against it.

Torch's reader unpickles the index, so a doctored one could run anything. Ours is read first, by an unpickler that knows
the descriptions of tensors and files and nothing else.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from megatron_aligndistil.errors import CheckpointError, reason

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
        data = (folder / INDEX).read_bytes()
        _check_lengths(data)
        index = _IndexUnpickler(io.BytesIO(data)).load()
        _check_structure(index)
        return index
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder / INDEX}: no such file; the checkpoint is incomplete") from error
    except Exception as error:  # its instructions fail as any program's do
        raise CheckpointError(f"{folder / INDEX}: not a checkpoint's index ({reason(error)})") from error


def _check_lengths(data: bytes) -> None:
    """Refuse a pickle that asks for more memory than its own size warrants, before a reader gives it."""
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name in ("FRAME", "PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise ValueError(f"{opcode.name} {argument} at byte {position} of {len(data)}")


def _check_structure(index: Any) -> None:
    """Refuse an index that is not torch's tables of tensors and of places in files."""
    if not isinstance(index.storage_data, dict):
        raise ValueError("it lists no files")
    for key, place in index.storage_data.items():
        sizes = place.offset, place.length
        if not isinstance(key.fqn, str) or not isinstance(place.relative_path, str):
            raise ValueError("it names a file or a tensor by something else than text")
        if any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError(f"a tensor lies at {sizes}")
    for name, kept in index.state_dict_metadata.items():
        is_tensor = isinstance(kept, TensorStorageMetadata) and isinstance(kept.properties.dtype, torch.dtype)
        if not isinstance(name, str) or not (is_tensor or isinstance(kept, BytesStorageMetadata)):
            raise ValueError("it describes something else than tensors and objects")


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
    if not has_common_object:
        common = folder / _COMMON_FILE
        _check_plain(
            common.read_bytes(), f"{common}: cannot read the checkpoint: this file holds more than plain values"
        )
    ends: dict[str, int] = {}
    for item in index.storage_data.values():
        if Path(item.relative_path).name != item.relative_path or "\0" in item.relative_path:
            raise CheckpointError(f"{folder / INDEX}: it refers to {item.relative_path[:80]!r}, outside its folder")
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
            data = file.read(item.length)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {name[:80]} is not plain values and is not read ({reason(error)})") from error
    _check_plain(data, f"{path}: {name[:80]} is not plain values and is not read")


def _check_plain(data: bytes, complaint: str) -> None:
    """Raise ``complaint`` where ``torch.load`` would have to run something to read ``data``."""
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's restricted unpickler, and the zip it reads from, fail in many ways
        # Around its one useful sentence torch explains how to run the file all the same.
        found = re.search(r"(?:Unsupported|WeightsUnpickler error:)[^\n]{0,120}", str(error))
        said = found[0] if found else reason(error).partition(".")[0]
        raise CheckpointError(f"{complaint} ({said})") from error
