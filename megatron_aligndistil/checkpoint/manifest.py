"""A checkpoint's manifest: size and SHA-256 of every file, written last, so that damage is named before it is used.

Each rank hashes what it wrote, in the process that wrote it; on loading the files are shared out over the ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_aligndistil.errors import CheckpointError, reason

MANIFEST = "manifest.json"
_FORMAT = 1
_PARTS = ".hashes-"  # what a rank's writer leaves for the first rank to collect
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    sha256: str


def record_of(path: Path, settle: bool = False) -> FileRecord:
    """Read a file through; ``settle`` also waits until it is on the disk, as Megatron-Core does not for small ones."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
        if settle:
            os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def leave_records(checkpoint: Path, folder: str, rank: int) -> None:
    """Hash what ``rank`` has written in a folder of ``checkpoint``, for ``write_manifest`` to collect."""
    files = {f"{folder}/{path.name}": asdict(record_of(path)) for path in (checkpoint / folder).glob(f"__{rank}_*")}
    (checkpoint / f"{_PARTS}{folder}-{rank}").write_text(json.dumps(files))


def write_manifest(checkpoint: Path) -> None:
    """Collect the records that ranks have left, hash the other files, and write the manifest: the last file."""
    records: dict[str, dict[str, Any]] = {}
    for part in sorted(checkpoint.glob(f"{_PARTS}*")):
        records |= json.loads(part.read_text())
        part.unlink()
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_file() and name not in records and name != MANIFEST:
            records[name] = asdict(record_of(path, settle=True))
    files = dict(sorted(records.items()))
    content = {"format": _FORMAT, "sha256": _digest(files), "files": files}
    with (checkpoint / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(checkpoint: Path) -> dict[str, FileRecord]:
    """What the files of ``checkpoint`` must be, by their paths in it.

    Raises:
        CheckpointError: it is missing, or damaged itself.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        if content["sha256"] != _digest(content["files"]):
            raise ValueError("it does not fit its own hash")
        return {_inside(name): _typed(FileRecord(**record)) for name, record in content["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, or not a manifest of this version ({reason(error)})") from error


def _typed(record: FileRecord) -> FileRecord:
    if type(record.bytes) is not int or type(record.sha256) is not str:
        raise ValueError("it records something else than sizes and hashes")
    return record


def _inside(name: str) -> str:
    """A manifest sends nobody to read other files than the checkpoint's own."""
    path = Path(name)
    name.encode()  # half surrogates are no file's name: a ValueError
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or len(name) > 1000:
        raise ValueError(f"{name[:80]!r} is not a file of the checkpoint")
    return name


def damage(checkpoint: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with the files that this rank of ``ranks`` looks at, in one line that names one; None: nothing.

    All sizes are looked at by every rank; the files are read through by one rank each.
    """
    try:
        records = read_manifest(checkpoint)
        for name, record in records.items():
            size = (checkpoint / name).stat().st_size
            if size != record.bytes:
                return f"{checkpoint / name}: damaged: {size} bytes instead of {record.bytes}"
        for name in _share(records, rank, ranks):
            if record_of(checkpoint / name) != records[name]:
                return f"{checkpoint / name}: damaged: its content is not what was written (SHA-256)"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: damaged: {error.strerror or error}"
    return None


def _share(records: Mapping[str, FileRecord], rank: int, ranks: int) -> list[str]:
    """The largest files first, each to the rank that has the least so far."""
    loads, own = [0] * ranks, []
    for name in sorted(records, key=lambda name: (-records[name].bytes, name)):
        least = loads.index(min(loads))
        loads[least] += records[name].bytes
        if least == rank:
            own.append(name)
    return own


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
