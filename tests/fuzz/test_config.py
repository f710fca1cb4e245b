"""Overrides and YAML files: whatever they hold, a checked run or one line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from megatron_aligndistil.config import analysis_rules, certify, evaluation_rules
from megatron_aligndistil.config.analysis_schema import ANALYSES
from megatron_aligndistil.config.checks import check
from megatron_aligndistil.config.compose import RECIPES, load_config, load_overrides, recipe_names, to_yaml
from megatron_aligndistil.config.evaluation_schema import EVALUATIONS
from megatron_aligndistil.config.schema import SCHEMAS
from megatron_aligndistil.errors import ConfigError
from tests.fuzz.mutations import AWKWARD_TEXTS, junk_scalars, spoiled_bytes
from tests.fuzz.reader import Reader

SECTIONS = (
    *("model.", "trainer.", "exp_manager.", "algorithm", "models", "analysis.", "output"),
    *("evaluation.", "judge.", "sampling.", "reward.", "benchmark.", "cache_dir", "outputs"),
)
VALUES = (
    *("0", "1", "-1", "2", "8", "1e400", "-1e400", "nan", "inf", "-inf", "1e-320", "0.0", "-0", "1_000", "0x1F", "1.5"),
    *(str(2**63), str(10**40), "9" * 5000, "true", "false", "yes", "null", "none", "???", "", "''", '""', "~"),
    *("[]", "[1,2]", "[a,[b]]", "{}", "{a:1}", "{a:{b:[1]}}", "[" * 200, "[" * 100 + "]" * 100, "{" * 50, "a,b", "1,2"),
    *("${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}", "${model.seed}", "${nothing}", "${model}", "${.seed}", "${"),
    *("${model.optim.lr}", "${oc.create:{a:1}}", "${oc.decode:'['}", "${hydra:runtime.cwd}", "$${x}", "${${x}}"),
    *("choice(1,2)", "range(0,10)", "glob(*)", "int(x)", "sort(3,1)", "shuffle(a)", "tag(x,y)", "json_str({})"),
    *("32", "64", "bf16-mixed", "adam", "both", "packed", "function", "model", "rollout", "vllm", "lora", "gpu"),
    *("\x00", "\n", "a\nb", "\t", "é", "🦜", "\ud800", "'", '"', "\\", "a=b", "a b", "@x", "/", "~/x", "a" * 5000),
)


def keys_of(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a dataclass, sections too."""
    kinds = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from keys_of(kinds[field.name], f"{prefix}{field.name}.")


@st.composite
def overrides(draw: DrawFn, keys: list[str]) -> list[str]:
    """One to three overrides: keys that exist or almost do, values of every type, all of Hydra's prefixes."""
    given = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(keys))
        if draw(st.integers(0, 7)) == 0:
            key = draw(st.sampled_from((key[:-1], f"{key}.x", f"{key}[0]", key.upper(), f".{key}", f"{key}.", "a", "")))
        if draw(st.integers(0, 19)) == 0:
            key = draw(st.sampled_from(AWKWARD_TEXTS) | st.text(max_size=6))
        value = draw(st.sampled_from(VALUES) | st.text(max_size=8) | junk_scalars().map(str))
        prefix = draw(st.sampled_from(("", "", "", "", "", "+", "++", "~")))
        joint = draw(st.sampled_from(("=", "=", "=", "=", "=", "=", "", "==", ":=")))
        given.append(f"{prefix}{key}{joint}{value}")
    return given


def test_overrides(record) -> None:
    reader = Reader("overrides")
    keys = {name: list(keys_of(schema)) for name, schema in SCHEMAS.items()}

    def run(recipe: str, given: list[str]) -> None:
        config = load_config(recipe, ["model.restore_from_path=.", "model.data.data_prefix.train=[x]", *given])
        check(config)
        assert to_yaml(config)

    recipes = st.sampled_from(recipe_names())
    pairs = recipes.flatmap(lambda name: overrides(keys[_algorithm(name)]).map(lambda given: (name, given)))
    record(reader.fuzz(pairs, lambda pair: reader.read(lambda: run(*pair), *SECTIONS, *pair[1], *folded(pair[1]))))


def folded(given: list[str]) -> list[str]:
    return [" ".join(text.split()) for text in given]


def _algorithm(recipe: str) -> str:
    defaults = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    return str(defaults.get("algorithm", recipe)) if str(defaults.get("algorithm", recipe)) in SCHEMAS else "dpo"


def test_settings_of_analyses_and_certificate(record) -> None:
    reader = Reader("analysis and certify settings")
    schemas = {**ANALYSES, **EVALUATIONS, "certify": certify.CertifyConfig}
    keys = {name: list(keys_of(schema)) for name, schema in schemas.items()}
    judged = ["model.restore_from_path=.", "judge.base_url=http://h", "judge.model=m"]
    needed = {
        "reward_accuracy": ["models.dpo=.", "models.reverse_dpo=.", "models.reference=.", "analysis.test=[x]"],
        "tokens": ["models.dpo=.", "models.reverse_dpo=.", "analysis.data=[x]"],
        "extrapolation": ["analysis.prompts=[x]"],
        **{name: judged for name in EVALUATIONS},
        "arena_hard": [*judged, "benchmark.folder=."],
    }

    def run(name: str, given: list[str]) -> None:
        if name == "certify":
            certify.as_run(load_overrides(certify.CertifyConfig, given, "certify"), None, None)
            return
        config = load_overrides(schemas[name], ["output=out", *needed[name], *given], name)
        (evaluation_rules if name in EVALUATIONS else analysis_rules).check(config)
        analysis_rules.as_run(config, ".")

    pairs = st.sampled_from(list(schemas)).flatmap(lambda name: overrides(keys[name]).map(lambda given: (name, given)))
    record(reader.fuzz(pairs, lambda pair: reader.read(lambda: run(*pair), *SECTIONS, *pair[1], *folded(pair[1]))))


WHOLE_FILES = (
    *("", "null", "[]", "- a", "a", "1", "{", "a: [", "a:\n\tb: 1", "%YAML 9.9\n---\n{}", "---\n---\n{}", "!!set {a}"),
    *("defaults: [dpo, _self_]\n" * 2, "defaults: dpo", "defaults: [own]", "defaults: [x, _self_]", "defaults: {a: b}"),
    *("defaults: [dpo]\nmodel: null", "defaults: [dpo, _self_]\nmodel: 3", "defaults: [null]", "defaults: [[dpo]]"),
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b]\nd: [*c, *c, *c, *c, *c, *c]",
    "defaults: [dpo, _self_]\nmodel: &m {data: *m}",
    "defaults: [dpo, _self_]\nmodel: {seed: 1, seed: 2}",
    "defaults: [dpo, _self_]\n? [a, b]\n: c",
    "defaults: [dpo, _self_]\n1: 2\nnull: 3\ntrue: 4",
    "defaults: [dpo, _self_]\nmodel: !!python/object/apply:os.system ['false']",
    "defaults: [dpo, _self_]\nmodel: {seed: !!binary aGFsbG8=}",
    "defaults: [dpo, _self_]\nmodel: {seed: 2020-01-01}",
    "algorithm: dpo\nmodel: ${model}",
    "algorithm: ${algorithm}",
    "algorithm: ???",
    "algorithm: {a: b}",
    "x: " + "[" * 3000,
    "x: " + "{a: " * 3000,
    "\ufeffdefaults: [dpo, _self_]",
    "defaults: [dpo, _self_]\r\nmodel:\r\n  seed: 1\r\n",
)


def test_own_yaml(record, tmp_path: Path) -> None:
    reader = Reader("own YAML")
    texts = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]
    inherited = [b"defaults: [dpo, _self_]\n" + text.partition(b"\n\n")[2] for text in texts]
    whole = st.sampled_from([text.encode("utf-8", "surrogatepass") for text in WHOLE_FILES])
    lines = st.lists(
        st.tuples(st.sampled_from(list(keys_of(SCHEMAS["dpo"]))), st.sampled_from(VALUES)), min_size=1, max_size=3
    ).map(_yaml_of)

    def check_file(content: bytes) -> None:
        (tmp_path / "own.yaml").write_bytes(content)
        reader.read(lambda: _loaded("own", tmp_path), "own.yaml", *SECTIONS)

    record(reader.fuzz(spoiled_bytes([*texts, *inherited]) | whole | lines | st.binary(max_size=30), check_file))


def _yaml_of(pairs: list[tuple[str, str]]) -> bytes:
    text = "defaults: [dpo, _self_]\n"
    for key, value in pairs:
        *above, last = key.split(".")
        for depth, name in enumerate(above):
            text += f"{'  ' * depth}{name}:\n"
        text += f"{'  ' * len(above)}{last}: {value}\n"
    return text.encode("utf-8", "surrogatepass")


def _loaded(name: str, folder: Path) -> None:
    config = load_config(name, ["model.restore_from_path=.", "model.data.data_prefix.train=[x]"], folder)
    check(config)
    assert to_yaml(config)


@pytest.mark.parametrize("kind", ["folder", "loop", "broken link", "unreadable name", "fifo"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "own.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "broken link":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "fifo":
        os.mkfifo(path)
    name = "a" * 5000 if kind == "unreadable name" else "own"
    with pytest.raises(ConfigError, match=r"\A[^\n]*(own|aaaa)[^\n]*\Z"):
        _loaded(name, tmp_path)
