"""Hugging Face tensors as they lie in files: sharded safetensors, or a GGUF file that is dequantised on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_aligndistil.config.json_text import read_json
from megatron_aligndistil.errors import CheckpointError, reason
from megatron_aligndistil.models import families
from megatron_aligndistil.models.families.rules import MemoryPart, Part, Shape
from megatron_aligndistil.models.families.table import hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorSource(Protocol):
    """Named tensors of which slices can be read one at a time. ``origin`` is what an error message names."""

    origin: Path
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    def part(self, name: str) -> Part: ...


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file, missing or truncated ({reason(error)})"
        ) from error


@dataclass(frozen=True)
class _FilePart:
    """A tensor in a safetensors file. The file is mapped only while a slice is taken, so its pages don't pile up."""

    file: Path
    name: str
    shape: Shape

    def take(self, dimension: int, start: int, stop: int) -> Tensor:
        with _opened(self.file) as handle:
            piece = handle.get_slice(self.name)
            return piece[start:stop] if dimension == 0 else piece[:, start:stop]


def _file_name(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is not the name of a .safetensors file in its folder")
    return name


class SafetensorsFolder:
    """A Hugging Face folder with ``model.safetensors``, or shards and their index; or with the one file ``single``.

    Tensors go by their names without ``prefix``.
    """

    def __init__(self, folder: Path, single: str | None = None, prefix: str = "") -> None:
        self.origin = folder
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._parts: dict[str, _FilePart] = {}
        self._prefix = prefix
        for file in [folder / single] if single else self._shards():
            with _opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    self._add(file, name, handle.get_slice(name))

    def _shards(self) -> list[Path]:
        index = self.origin / INDEX
        if index.is_file():
            try:
                names = set(map(_file_name, read_json(index)["weight_map"].values()))
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index}: not a safetensors index ({reason(error)})") from error
            return sorted(self.origin / name for name in names)
        if (self.origin / SINGLE).is_file():
            return [self.origin / SINGLE]
        pickled = sorted(file.name for file in self.origin.glob("*.bin"))
        remedy = f"; convert {pickled[0]} to safetensors first, pickles are not read" if pickled else ""
        raise CheckpointError(f"{self.origin}: neither {SINGLE} nor {INDEX}{remedy}")

    def _add(self, file: Path, name: str, piece: Any) -> None:
        if piece.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{file}: {name} has dtype {piece.get_dtype()}; weights must be one of {', '.join(_DTYPES)}"
            )
        short = name.removeprefix(self._prefix)
        self._parts[short] = _FilePart(file, name, tuple(piece.get_shape()))
        self.shapes[short] = self._parts[short].shape
        self.dtypes[short] = _DTYPES[piece.get_dtype()]

    def part(self, name: str) -> Part:
        return self._parts[name]


class GGUFFile:
    """A GGUF file: tensors under their Hugging Face names, dequantised to float32 when they are read."""

    def __init__(self, file: Path, config: Any) -> None:
        import gguf

        self.origin = file
        self._config = config
        architecture = families.architecture_of(config)
        arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
        names = gguf.get_tensor_name_map(arch, architecture.num_layers)
        hf_names = {}
        for name in hf_shapes(families.table_of(architecture), architecture):
            stem, kind = name.rsplit(".", 1)
            hf_names[f"{names.get_name(stem)}.{kind}"] = name
        # A name that isn't known stays as it is, and is reported as one that the model doesn't have.
        self._tensors = {hf_names.get(tensor.name, tensor.name): tensor for tensor in open_gguf(file).tensors}
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        self.dtypes = dict.fromkeys(self._tensors, torch.float32)

    def part(self, name: str) -> Part:
        from gguf.quants import dequantize

        stored = self._tensors[name]
        # A copy: the reader's array is a read-only view of the file.
        tensor = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).view(self.shapes[name])
        if self._config.model_type == "llama":
            heads = {"q_proj": self._config.num_attention_heads, "k_proj": self._config.num_key_value_heads}
            for module, count in heads.items():
                if f".{module}." in name:
                    tensor = _rotary_halves(tensor, count)
        return MemoryPart(tensor)


def _rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """From GGUF's order of a Llama head's rows, rotated pairs side by side, to one half after the other."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def open_gguf(file: Path) -> Any:
    """A reader of a GGUF file (its tensors are mapped, not read).

    Raises:
        CheckpointError: the file isn't GGUF, or is cut short.
    """
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable GGUF file, or truncated ({reason(error)})") from error
