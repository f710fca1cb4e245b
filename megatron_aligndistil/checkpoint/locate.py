"""What a path given by the user is: a Hugging Face folder, a GGUF file, a Megatron checkpoint, a run's log folder, or
an adapter over another model (a PEFT folder, or the checkpoint of a run that trained one).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from megatron_aligndistil.checkpoint.adapter_config import (
    PEFT_CONFIG,
    STATE_KEY,
    SavedAdapter,
    from_state,
    read_peft,
)
from megatron_aligndistil.checkpoint.manifest import MANIFEST
from megatron_aligndistil.checkpoint.metadata import CONFIG, read_config
from megatron_aligndistil.config.json_text import read_json
from megatron_aligndistil.errors import CheckpointError, reason
from megatron_aligndistil.models import families
from megatron_aligndistil.models.architecture import Architecture

Kind = Literal["huggingface", "gguf", "megatron", "run", "peft"]

# A Megatron checkpoint is a folder with these, and a manifest, which is written last and so marks it complete.
WEIGHTS, METADATA, STATE = "weights", "huggingface", "state.json"
FORMAT = 1
_SHOWN_CHARACTERS = 80
# A run's checkpoints lie in <log folder>/checkpoints/step_<n>.
CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step_(\d+)")


def kind_of(path: str | Path) -> Kind:
    """What ``path`` is.

    Raises:
        CheckpointError: it doesn't exist, or is none of the five.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return "gguf"
        raise CheckpointError(f"{path}: a file that isn't GGUF; give a model folder or a .gguf file")
    if (path / WEIGHTS).is_dir():
        if not (path / MANIFEST).is_file():
            raise CheckpointError(f"{path}: incomplete checkpoint, {MANIFEST} is missing (its writing was interrupted)")
        return "megatron"
    if (path / PEFT_CONFIG).is_file():
        return "peft"
    if (path / CONFIG).is_file():
        return "huggingface"
    if (path / CHECKPOINTS).is_dir():
        return "run"
    raise CheckpointError(
        f"{path}: neither a Hugging Face folder ({CONFIG}), a Megatron checkpoint ({WEIGHTS}/, {MANIFEST}), "
        f"a run's log folder ({CHECKPOINTS}/) nor a PEFT adapter ({PEFT_CONFIG})"
    )


def model_path(path: str | Path) -> Path:
    """``path`` itself, or a run's newest complete checkpoint; ``~`` is the home folder.

    Raises:
        CheckpointError: the path is unknown, or the run has no complete checkpoint.
    """
    path = Path(path).expanduser()
    if kind_of(path) != "run":
        return path
    complete = complete_checkpoints(path)
    if not complete:
        raise CheckpointError(f"{path / CHECKPOINTS}: no complete checkpoint (step_<n>/{MANIFEST})")
    return complete[-1]


def complete_checkpoints(log_folder: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    steps = []
    for folder in (log_folder / CHECKPOINTS).glob("step_*"):
        match = _STEP.fullmatch(folder.name)
        if match and (folder / MANIFEST).is_file():
            steps.append((int(match[1]), folder))
    return [folder for _, folder in sorted(steps)]


def metadata_source(path: str | Path) -> Path:
    """Where config and tokenizer of a model are: a folder as transformers reads it, or the GGUF file itself.

    Raises:
        CheckpointError: as ``model_path``.
    """
    found = model_path(path)
    seen = [found.resolve()]
    while kind_of(found) == "peft":
        named = read_peft(found).base
        try:
            base = model_path(named)
        except CheckpointError as error:
            raise CheckpointError(f"{found / PEFT_CONFIG}: base_model_name_or_path={named}: {error}") from error
        if base.resolve() in seen:
            raise CheckpointError(f"{found / PEFT_CONFIG}: base_model_name_or_path={base}: an adapter over itself")
        seen.append(base.resolve())
        found = base
    return found / METADATA if kind_of(found) == "megatron" else found


def saved_adapter(path: str | Path) -> SavedAdapter | None:
    """The adapter at ``path``, None where a whole model is.

    Raises:
        CheckpointError: as ``model_path``; or the adapter is damaged, or of a kind that isn't implemented.
    """
    found = model_path(path)
    kind = kind_of(found)
    if kind == "peft":
        return read_peft(found)
    entry = read_state(found).get(STATE_KEY) if kind == "megatron" else None
    return from_state(found, entry, read_architecture(found).scalar_head) if entry else None


def read_architecture(path: str | Path) -> Architecture:
    """The architecture of the model at ``path``.

    Raises:
        CheckpointError: the path is unknown, its config is damaged, or the model isn't implemented.
    """
    found = model_path(path)
    architecture = families.architecture_of(read_config(metadata_source(found)))
    scalar = kind_of(found) == "peft" and read_peft(found).scalar
    return architecture.with_scalar_head() if scalar else architecture


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A Megatron checkpoint's ``state.json``.

    Raises:
        CheckpointError: it is damaged, or of a format that this version doesn't read.
    """
    file = checkpoint / STATE
    try:
        state = read_json(file)
        found = state["format"]
        if found == FORMAT and (type(state["step"]) is not int or state["step"] < 0):
            raise ValueError(f"step is {state['step']!r}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{file}: not a checkpoint's state ({reason(error)})") from error
    if found != FORMAT:
        shown = repr(found)[:_SHOWN_CHARACTERS]
        raise CheckpointError(f"{file}: format {shown} is not read by this version, which reads {FORMAT}")
    return dict(state)
