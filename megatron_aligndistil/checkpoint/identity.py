"""Which model a path holds, by content: the same weights elsewhere are the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from megatron_aligndistil.checkpoint.locate import kind_of, model_path, saved_adapter
from megatron_aligndistil.checkpoint.manifest import MANIFEST, record_of

# What a Hugging Face or PEFT folder's answers depend on.
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def content_of(path: str | Path) -> str:
    """SHA-256 of a model's weights, configuration and tokenizer, an adapter's with its base's.

    Reads all weights through, at a disk's speed; of a Megatron checkpoint the manifest, which has their hashes.

    Raises:
        CheckpointError: as ``model_path``.
    """
    digest = hashlib.sha256()
    for name, content in _parts(Path(path)):
        digest.update(f"{name}:{content}\n".encode())
    return digest.hexdigest()


def _parts(path: Path) -> Iterator[tuple[str, str]]:
    found = model_path(path)
    kind = kind_of(found)
    if kind == "gguf":
        yield "gguf", record_of(found).sha256
    elif kind == "megatron":
        yield MANIFEST, record_of(found / MANIFEST).sha256
    else:
        files = {file for pattern in _PATTERNS for file in found.glob(pattern) if file.is_file()}
        for file in sorted(files):
            yield file.name, record_of(file).sha256
    if saved := saved_adapter(found):
        yield "base", content_of(saved.base)
