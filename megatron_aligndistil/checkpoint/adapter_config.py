"""What an adapter on disk says of itself: PEFT's ``adapter_config.json``, or the state of a run that trained one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.families.lora import PEFT_DOWN, PROJECTIONS, hf_modules
from megatron_aligndistil.models.lora import LoRASettings

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
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
        settings = LoRASettings(int(entry["rank"]), float(entry["alpha"]), tuple(entry["targets"]))
        return SavedAdapter(checkpoint, Path(entry["base"]), settings, "megatron", scalar)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}/state.json: {STATE_KEY} is not an adapter's ({error!r})") from error


def read_peft(folder: Path) -> SavedAdapter:
    """The adapter of a PEFT folder.

    Raises:
        CheckpointError: damaged, a kind that isn't implemented, or its base isn't a local folder.
    """
    file = folder / PEFT_CONFIG
    try:
        config = json.loads(file.read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        base = Path(str(config["base_model_name_or_path"]))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{file}: not a LoRA adapter's config ({error!r})") from error
    _refuse(file, config)
    if not base.exists():
        raise CheckpointError(
            f"{file}: base_model_name_or_path={base}: no such folder; download it and correct the path"
        )
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # which is scaled by 1/√r, not 1/r
    settings = LoRASettings(rank, alpha, _targets(folder / PEFT_WEIGHTS))
    return SavedAdapter(folder, base, settings, "peft", _SCORE in (config.get("modules_to_save") or ()))


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
            raise CheckpointError(f"{file}: {name}={found!r} is not implemented; supported: {supported!r}")


def _targets(file: Path) -> tuple[str, ...]:
    """Our projections of which the file updates at least a part."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file, missing or truncated ({error})") from error
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
