"""Where the YAML file that a name stands for is: in the user's folder, among our recipes, or in the folder above."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_aligndistil.config.schema import SCHEMAS, RunConfig
from megatron_aligndistil.errors import ConfigError

RECIPES = Path(__file__).resolve().parent / "recipes"


def recipe_names() -> list[str]:
    """Names that ``--config-name`` accepts without a folder of the user's own."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def own_file(name: str, config_dir: str | os.PathLike[str]) -> tuple[str, Path]:
    """The name and the folder of a YAML file of the user's for a command without recipes."""
    name, folder = name.removesuffix(".yaml"), Path(config_dir).expanduser().resolve()
    if not _is_file(folder / f"{name}.yaml"):
        raise ConfigError(f"--config-name {name}: {folder} holds no {name}.yaml; correct the name or --config-dir")
    return name, folder


def found(name: str, config_dir: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """The folder that the search begins in, and the file ``name`` in it, among our recipes or in the folder above."""
    places = [RECIPES]
    if config_dir is not None:
        folder = Path(config_dir).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder")
        places = [folder, RECIPES, folder.parent]
    for place in places:
        if _is_file(place / f"{name}.yaml"):
            return (RECIPES if place == RECIPES else places[0]), place / f"{name}.yaml"
    known = ", ".join(dict.fromkeys(path.stem for place in places for path in sorted(place.glob("*.yaml"))))
    hint = "" if config_dir is not None else "; --config-dir adds a folder of your own"
    raise ConfigError(f"--config-name {name}: no such config; there are {known}{hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long for any file
        return False


def schema_in(path: Path) -> type[RunConfig]:
    """The schema to look for close keys in, when composing failed before the type was known."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return RunConfig
    named = [name for name in SCHEMAS if re.search(rf"\b{name}(_schema)?\b", text)]
    return SCHEMAS[max(named, key=len)] if named else RunConfig
