"""What an adapter on disk says of itself: PEFT's ``adapter_config.json``, or the state of a run that trained one."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from megatron_aligndistil.config.json_text import read_json
from megatron_aligndistil.errors import CheckpointError, reason
from megatron_aligndistil.models.families.lora import PEFT_DOWN, PROJECTIONS, hf_modules
from megatron_aligndistil.models.lora import LoRASettings

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
_LARGEST_RANK = 2**14
_SHOWN_CHARACTERS = 80
STATE_KEY = "lora"  # in a checkpoint's state.json
_SCORE = "score"  # PEFT's name of a classifier's head among modules_to_save
_PROJECTION = re.compile(rf"{re.escape(PEFT_PREFIX)}model\.layers\.\d+\.\w+\.(\w+)\.{re.escape(PEFT_DOWN)}")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk. ``base`` is the model that it was trained on, ``scalar`` whether it brings a scalar head."""

    path: Path
    base: Path
    settings: LoRASettings
    form: Literal["peft", "megatron"]
    scalar: bool


def state_entry(settings: LoRASettings, base: Path) -> dict[str, Any]:
    """What ``state.json`` keeps of the adapter that a run trains."""
    return {**asdict(settings), "targets": list(settings.targets), "base": str(base)}


def from_state(checkpoint: Path, entry: Mapping[str, Any], scalar: bool) -> SavedAdapter:
    """The adapter of a checkpoint whose state has ``entry``.

    Raises:
        CheckpointError: the entry is damaged.
    """
    try:
        settings, base = _settings(entry["rank"], entry["alpha"], tuple(entry["targets"])), Path(entry["base"])
        if base.resolve() == checkpoint.resolve():
            raise ValueError("its base is the adapter itself")
        return SavedAdapter(checkpoint, base, settings, "megatron", scalar)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint}/state.json: {STATE_KEY} is not an adapter's ({reason(error)})") from error


def _settings(rank: Any, alpha: Any, targets: tuple[str, ...]) -> LoRASettings:
    """Raises ValueError for what no adapter has."""
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        raise ValueError(f"its rank is {rank!r}, not a whole number from 1 to {_LARGEST_RANK}")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"its alpha is {alpha!r}, not a number")
    if not set(targets) <= set(PROJECTIONS):
        raise ValueError(f"its targets are {targets!r}, not some of {', '.join(PROJECTIONS)}")
    return LoRASettings(rank, float(alpha), targets)


def read_peft(folder: Path) -> SavedAdapter:
    """The adapter of a PEFT folder.

    Raises:
        CheckpointError: damaged, a kind that isn't implemented, or its base isn't a local folder.
    """
    file = folder / PEFT_CONFIG
    try:
        config = read_json(file)
        settings = _settings(config["r"], config["lora_alpha"], ())
        base, saved = Path(str(config["base_model_name_or_path"])), tuple(config.get("modules_to_save") or ())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{file}: not a LoRA adapter's config ({reason(error)})") from error
    _refuse(file, {**config, "modules_to_save": saved})
    if not os.path.exists(base):
        raise CheckpointError(
            f"{file}: base_model_name_or_path={str(base)[:200]}: no such folder; download it and correct the path"
        )
    # rsLoRA is scaled by 1/√r, not 1/r.
    alpha = settings.alpha * (math.sqrt(settings.rank) if config.get("use_rslora") else 1.0)
    settings = LoRASettings(settings.rank, alpha, _targets(folder / PEFT_WEIGHTS))
    return SavedAdapter(folder, base, settings, "peft", _SCORE in saved)


def _refuse(file: Path, config: Mapping[str, Any]) -> None:
    others = [name for name in config.get("modules_to_save") or () if name != _SCORE]
    for name, found, supported in (
        ("peft_type", config.get("peft_type"), "LORA"),
        ("bias", config.get("bias", "none"), "none"),
        ("use_dora", config.get("use_dora") or False, False),
        ("rank_pattern", config.get("rank_pattern") or {}, {}),
        ("alpha_pattern", config.get("alpha_pattern") or {}, {}),
        ("modules_to_save", others, []),
    ):
        if found != supported:
            shown = repr(found)[:_SHOWN_CHARACTERS]
            raise CheckpointError(f"{file}: {name}={shown} is not implemented; supported: {supported!r}")


def _targets(file: Path) -> tuple[str, ...]:
    """Our projections of which the file updates at least a part."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file, missing or truncated ({reason(error)})"
        ) from error
    modules = {match[1] for name in names if (match := _PROJECTION.fullmatch(name))}
    targets = tuple(target for target in PROJECTIONS if modules & set(hf_modules((target,))))
    if unknown := modules - set(hf_modules(targets)):
        raise CheckpointError(
            f"{file}: updates {', '.join(sorted(unknown))}; supported: {', '.join(hf_modules(PROJECTIONS))}"
        )
    if not targets:
        raise CheckpointError(f"{file}: holds no update of a projection that is known")
    return targets


def peft_config(settings: LoRASettings, base: Path, scalar: bool) -> dict[str, Any]:
    """The ``adapter_config.json`` of an adapter of ours."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": hf_modules(settings.targets),
        "modules_to_save": [_SCORE] if scalar else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
