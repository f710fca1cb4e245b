"""YAML files and ``key=value`` overrides → one typed ``RunConfig``. The only importer of Hydra and OmegaConf.

A recipe inherits from its algorithm's schema; a user's YAML inherits from a recipe (``defaults: [dpo, _self_]``) or is
a resolved config that an earlier run saved. Whatever is wrong with a key or a value becomes one ``ConfigError`` line.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.config.keys import bare, closest, key_of
from megatron_aligndistil.config.schema import SCHEMAS, RunConfig
from megatron_aligndistil.config.yaml_files import RECIPES, found, own_file, recipe_names, schema_in
from megatron_aligndistil.errors import ConfigError, reason

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class _Source:
    """What the user gave, and the schema that its keys are looked up in: what an error message quotes."""

    name: str
    overrides: tuple[str, ...]
    schema: type[Any]


@dataclass(frozen=True)
class Entry:
    """What Hydra composes: the file ``name`` in ``folder``, under ``overrides``, which name more folders to search."""

    folder: Path
    name: str
    overrides: list[str]


def compose_api(entry: Entry) -> DictConfig:
    """By Hydra's own compose; another launcher's way takes its place in ``load_config`` (``launch.nemo``)."""
    with initialize_config_dir(str(entry.folder), job_name="aligndistil", version_base="1.3"):
        return compose(entry.name, overrides=entry.overrides)


Composer = Callable[[Entry], DictConfig]


def load_config(
    config_name: str,
    overrides: Sequence[str] = (),
    config_dir: str | os.PathLike[str] | None = None,
    composer: Composer = compose_api,
) -> RunConfig:
    """The run that ``config_name`` and Hydra ``overrides`` describe, with every mandatory key set.

    ``<config_name>.yaml`` is looked for in ``config_dir``, then among our recipes, then in the folder above
    ``config_dir``; a file inherits from others (``defaults``) that are looked for in the same order.
    Raises ConfigError; the combinations of values are judged by ``checks``, not here.
    """
    composed, source = _compose(config_name, overrides, config_dir, composer)
    with _one_line(source):
        _refuse_missing(composed)
        config = OmegaConf.to_object(composed)
    assert isinstance(config, source.schema)
    return config


def load_overrides(
    schema: type[Settings],
    overrides: Sequence[str],
    command: str,
    own: tuple[str, str | os.PathLike[str]] | None = None,
) -> Settings:
    """The defaults of a dataclass ``schema`` under Hydra ``overrides``: the settings of a command without recipes.

    ``own`` is the name and the folder of a YAML file of the user's, which begins with ``defaults: [<command>, _self_]``
    and comes between the two. Raises ConfigError.
    """
    _refuse_hydras_own(overrides)
    name, folder = (command, RECIPES) if own is None else own_file(*own)
    source = _Source(name, tuple(overrides), schema)
    ConfigStore.instance().store(name=command, node=schema)
    with _one_line(source), initialize_config_dir(str(folder), job_name="aligndistil", version_base="1.3"):
        values = OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=False)
        settings = OmegaConf.merge(OmegaConf.structured(schema), values)
        _refuse_missing(settings)
        made = OmegaConf.to_object(settings)
    assert isinstance(made, schema)
    return made


def describe_config(
    config_name: str,
    overrides: Sequence[str] = (),
    config_dir: str | os.PathLike[str] | None = None,
    composer: Composer = compose_api,
) -> str:
    """The same run as YAML with interpolations resolved; ``???`` stands where a mandatory value is still missing."""
    composed, source = _compose(config_name, overrides, config_dir, composer)
    with _one_line(source):
        return OmegaConf.to_yaml(composed, resolve=True)


def load_resolved(path: str | os.PathLike[str]) -> RunConfig:
    """A config that ``save_resolved`` wrote."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    return load_config(path.stem, (), path.parent)


def to_yaml(config: RunConfig) -> str:
    """``config`` as YAML, every key of its schema included."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_resolved(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write ``to_yaml(config)`` to ``path`` atomically, making its folder where needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_yaml(config))


def _compose(
    config_name: str, overrides: Sequence[str], config_dir: str | os.PathLike[str] | None, composer: Composer
) -> tuple[DictConfig, _Source]:
    name = config_name.removesuffix(".yaml")
    _refuse_hydras_own(overrides)
    folder, file = found(name, config_dir)
    source = _Source(name, tuple(overrides), schema_in(file))
    _register()
    # Hydra caches that it has not found the first file, before it reads its search path: it gets one that names it.
    entry = name if file.parent == folder else "_found_above"
    ConfigStore.instance().store(name="_found_above", node={"defaults": [name, "_self_"]})
    # The folder above comes last, so that what lies there by chance cannot stand in for a recipe.
    search = [f"hydra.searchpath=['file://{RECIPES}','file://{folder.parent}']"] if folder != RECIPES else []
    with _one_line(source):
        return _typed(composer(Entry(folder, entry, [*search, *overrides])), source)


@cache
def _register() -> None:
    """Schemas for recipes to inherit from; NeMo's and NeMo-Aligner's arithmetic: ``${multiply:${a},${b}}``."""
    for schema in dict.fromkeys(SCHEMAS.values()):
        ConfigStore.instance().store(name=_schema_node(schema), node=schema)
    arithmetic = {"multiply": operator.mul, "sum": operator.add, "subtract": operator.sub, "int_div": operator.floordiv}
    for name, function in arithmetic.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def read_foreign(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a YAML file of another program by dotted key, and why those that are missing here aren't known.

    Interpolations are resolved; an empty mapping is a value, ``???`` (mandatory) is left as it stands. Raises
    ConfigError.
    """
    _register()
    values: dict[str, Any] = {}
    unknown: dict[str, str] = {}

    def walk(node: DictConfig, prefix: str) -> None:
        for name in map(str, node):
            key = f"{prefix}{name}"
            try:
                value = "???" if OmegaConf.is_missing(node, name) else node[name]
                if isinstance(value, DictConfig) and len(value):
                    walk(value, f"{key}.")
                else:
                    is_node = OmegaConf.is_config(value)
                    values[key] = OmegaConf.to_container(value, resolve=True) if is_node else value
            except (OmegaConfBaseException, ArithmeticError, TypeError) as error:
                unknown[key] = reason(error).partition(" full_key:")[0]  # what follows is OmegaConf's own

    with _one_line(_Source(str(path.with_suffix("")), (), RunConfig)):
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: a list; give a file that is a mapping of keys")
        walk(loaded, "")
    return values, unknown


def _refuse_missing(composed: Any) -> None:
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        remedy = " ".join(f"{key}=<value>" for key in missing)
        raise ConfigError(f"{' and '.join(missing)}: mandatory, but not set; add {remedy}")


def _refuse_hydras_own(overrides: Sequence[str]) -> None:
    for override in overrides:
        if key_of(override).startswith("hydra."):
            raise ConfigError(f"{override}: Hydra's own settings have no effect here; use exp_manager and --config-dir")


@contextmanager
def _one_line(source: _Source) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(_explain(error, source)) from error


def _schema_node(schema: type[RunConfig]) -> str:
    """``dpo_schema`` for DPORunConfig: the name that a recipe's ``defaults`` inherits from."""
    return schema.__name__.removesuffix("RunConfig").lower() + "_schema"


def _typed(composed: DictConfig, source: _Source) -> tuple[DictConfig, _Source]:
    """Merge onto a fresh schema: types a YAML that inherits none, and refuses keys that ``+key`` forced in."""
    algorithm = "???" if OmegaConf.is_missing(composed, "algorithm") else str(composed.get("algorithm"))
    if algorithm not in SCHEMAS:
        raise ConfigError(
            f"{source.name}.yaml: algorithm={algorithm} is not one of {', '.join(SCHEMAS)}; "
            f"begin the file with 'defaults: [dpo, _self_]' or another recipe's name"
        )
    source = replace(source, schema=SCHEMAS[algorithm])
    inherited = OmegaConf.get_type(composed)
    if inherited is not dict and inherited is not source.schema:
        raise ConfigError(f"algorithm={algorithm}: {source.name} has another schema; use --config-name {algorithm}")
    values = OmegaConf.to_container(composed, resolve=False)
    with _one_line(source):
        typed = OmegaConf.merge(OmegaConf.structured(source.schema), values)
    assert isinstance(typed, DictConfig)
    return typed, source


def _explain(error: BaseException, source: _Source) -> str:
    """One line: the key, its value, what is wrong, the remedy."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not valid YAML: {error.problem}; correct that line"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not a valid override; write key=value, and quote a value with special characters"
    cause = _omegaconf_cause(error)
    if cause is None or not cause.full_key:
        return _explain_composition(error, source)
    key = str(cause.full_key)
    given = next((text for text in source.overrides if f"{key_of(text)}.".startswith(f"{bare(key)}.")), None)
    file = re.match(r"In '([^']+)'", str(error))  # names the one file, of all that are inherited
    where = given or f"{file[1] if file else source.name}.yaml: {key}"
    first_line = str(cause).splitlines()[0]
    if isinstance(cause, ConfigKeyError) or "not in" in first_line:
        return _explain_unknown(given, where, key, source.schema)
    if "is not Optional" in first_line:
        return f"{where}: null is not allowed; give it {_expected(key, source.schema)}"
    if "does not support deletion" in first_line:
        return f"{where}: keys cannot be removed; set it to another value"
    if any(words in first_line for words in ("could not be converted", "Invalid", "is not a valid")):
        shown = "" if given else f"={cause.value}"
        return f"{where}{shown}: wrong type; expected {_expected(key, source.schema)}"
    return f"{where}: {first_line}; correct the value"


def _explain_composition(error: BaseException, source: _Source) -> str:
    file, text = f"{source.name}.yaml", reason(error)
    if isinstance(error, RecursionError):
        return f"{file}: its entries nest too deep, or refer to each other without an end; correct it or the overrides"
    if isinstance(error, MissingConfigException):
        known = ", ".join(recipe_names())
        return f"{file}: {text}; 'defaults' may name {known} and the files beside it and in the folder above"
    if text.startswith("Ambiguous value"):
        given = next((override for override in source.overrides if override in text), text)
        return f"{given}: several values; for a list write {key_of(given)}=[a,b], for text with a comma quote it"
    if section := re.search(r"is not a subclass of \w+\. value: (.*?)(?= full_key|$)", text):
        return f"{file}: {section[1]}: a single value where a section belongs; write its keys below it"
    in_overrides = type(error) is ValueError or text.startswith(("Could not override", "Could not delete"))
    blamed = " ".join(source.overrides) if in_overrides and source.overrides else file
    return f"{blamed}: {text}; write overrides as key=value and the file as a mapping of keys"


def _omegaconf_cause(error: BaseException | None) -> OmegaConfBaseException | None:
    while error is not None and not isinstance(error, OmegaConfBaseException):
        error = error.__cause__ or error.__context__
    return error


def _explain_unknown(given: str | None, where: str, key: str, schema: type[Any]) -> str:
    full_key = key_of(given) if given else key
    trains = schema in (RunConfig, *SCHEMAS.values())
    for algorithm, other in SCHEMAS.items():
        if trains and other is not schema and full_key in _keys(other):
            return f"{where}: a key of {algorithm}, not of this run; use --config-name {algorithm}, or remove it"
    close = closest(full_key, _keys(schema))
    if close is None:
        there = "--cfg job prints all keys" if trains else f"there are {', '.join(_keys(schema))}"
        return f"{where}: no such key; {there}"
    if full_key.startswith(f"{close}."):  # below a free-form mapping or a value
        free_form = isinstance(OmegaConf.select(OmegaConf.structured(schema), close), DictConfig)
        remedy = (
            f"write +{given or f'{key}=<value>'} to add it"
            if free_form
            else f"{close} holds {_expected(close, schema)}"
        )
        return f"{where}: no such key; {remedy}"
    return f"{where}: no such key; did you mean {close}?"


def _keys(schema: type[Any]) -> list[str]:
    """Every dotted leaf key, free-form mappings counted as leaves."""

    def walk(node: DictConfig, prefix: str) -> Iterable[str]:
        for name in map(str, node):
            value: Any = None if OmegaConf.is_missing(node, name) else node[name]
            if isinstance(value, DictConfig) and OmegaConf.get_type(value) is not dict:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return list(walk(OmegaConf.structured(schema), ""))


def _expected(key: str, schema: type[Any]) -> str:
    """The type that ``key`` takes, in words."""
    path, _, name = bare(key).rpartition(".")
    node: Any = OmegaConf.structured(schema)
    owner = OmegaConf.select(node, path) if path else node
    value = owner._get_node(name) if isinstance(owner, DictConfig) else None
    if value is None:
        return "another type"
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
    if OmegaConf.is_list(value):
        element = value._metadata.element_type.__name__  # type: ignore[attr-defined]
        return f"a list, each item {words[element]}: {bare(key)}=[a,b]"
    if OmegaConf.is_dict(value):
        return f"keys below it: {key}.<key>=<value>"
    kind = getattr(value._metadata.ref_type, "__name__", str(value._metadata.ref_type))
    return words.get(kind, kind) + (" or null" if value._metadata.optional else "")
