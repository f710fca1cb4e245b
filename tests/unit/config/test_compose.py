"""Composing: recipes, inheritance, round trips, and one clear line for each way to write a config wrongly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_aligndistil.config import compose
from megatron_aligndistil.config.schema import (
    AlignDistilRunConfig,
    DPORunConfig,
    IPORunConfig,
    KTORunConfig,
    SFTRunConfig,
    SimPORunConfig,
    TDPO1RunConfig,
    TDPO2RunConfig,
)
from megatron_aligndistil.errors import ConfigError

MODEL = "model.restore_from_path=somewhere"


def complaint(overrides: list[str], name: str = "dpo", folder: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose.load_config(name, overrides, folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "schema", "more"),
    [
        ("sft", SFTRunConfig, []),
        ("dpo", DPORunConfig, []),
        ("reverse_dpo", DPORunConfig, []),
        ("cdpo", DPORunConfig, []),
        ("tdpo1", TDPO1RunConfig, []),
        ("tdpo2", TDPO2RunConfig, []),
        ("simpo", SimPORunConfig, []),
        ("ipo", IPORunConfig, []),
        ("kto", KTORunConfig, []),
        ("aligndistil", AlignDistilRunConfig, ["model.aligndistil.dpo_path=d", "model.aligndistil.reverse_dpo_path=r"]),
    ],
)
def test_every_recipe_becomes_its_typed_object(name, schema, more):
    config = compose.load_config(name, [MODEL, *more, "trainer.devices=2", "model.optim.lr=3e-6"])
    assert type(config) is schema
    assert (config.algorithm, config.exp_manager.name) == (name, name)
    assert config.trainer.devices == 2
    assert config.model.optim.lr == 3e-6
    assert isinstance(config.model.optim.betas, list)


def test_every_recipe_is_listed():
    assert set(compose.recipe_names()) == {*compose.SCHEMAS, "aligndistil_on_policy"}


def test_published_settings():
    dpo = compose.load_config("dpo", [MODEL])
    assert isinstance(dpo, DPORunConfig)
    assert (dpo.model.dpo.beta, dpo.model.global_batch_size, dpo.model.optim.lr) == (0.1, 128, 1e-6)
    assert (dpo.model.optim.sched.warmup_ratio, dpo.model.encoder_seq_length, dpo.trainer.max_epochs) == (0.1, 2048, 1)
    ours = compose.load_config("aligndistil", [MODEL, "model.aligndistil.dpo_path=d"])
    assert isinstance(ours, AlignDistilRunConfig)
    section = ours.model.aligndistil
    # The authors' off-policy weight is 10 x sum |pi_d - pi_r|, twice the total variation distance.
    assert section.alpha * section.tvd_scale == 10 * 2
    tdpo2, simpo = compose.load_config("tdpo2", [MODEL]), compose.load_config("simpo", [MODEL])
    assert isinstance(tdpo2, TDPO2RunConfig) and isinstance(simpo, SimPORunConfig)
    assert (tdpo2.model.tdpo.beta, tdpo2.model.tdpo.alpha) == (0.1, 0.5)
    assert (simpo.model.simpo.beta, simpo.model.simpo.gamma) == (2.0, 1.0)


def test_the_folder_above_is_searched_last(tmp_path):
    """A family of models has its settings once: above the folders of its models."""
    own = tmp_path / "small"
    own.mkdir()
    (tmp_path / "family_dpo.yaml").write_text("defaults: [dpo, shared, model, _self_]\nmodel: {dpo: {beta: 0.3}}\n")
    (tmp_path / "shared.yaml").write_text("model: {optim: {lr: 3e-6}, micro_batch_size: 2}\n")
    (own / "model.yaml").write_text("model: {micro_batch_size: 4}\n")
    config = compose.load_config("family_dpo", [MODEL], own)
    assert isinstance(config, DPORunConfig)
    assert (config.model.dpo.beta, config.model.optim.lr, config.model.micro_batch_size) == (0.3, 3e-6, 4)

    (own / "family_dpo.yaml").write_text("defaults: [dpo, shared, _self_]\n")  # the nearer one
    assert compose.load_config("family_dpo", [MODEL], own).model.micro_batch_size == 2
    (tmp_path / "dpo.yaml").write_text("defaults: [dpo_schema, _self_]\nalgorithm: dpo\nmodel: {dpo: {beta: 9.0}}\n")
    for name in ("family_dpo", "dpo"):  # what lies above by chance doesn't stand in for a recipe
        inherited = compose.load_config(name, [MODEL, "exp_manager.name=x"], own)
        assert isinstance(inherited, DPORunConfig)
        assert inherited.model.dpo.beta == 0.1


def test_mistakes_in_the_folder_above_name_their_file(tmp_path):
    own = tmp_path / "small"
    own.mkdir()
    (tmp_path / "family.yaml").write_text("defaults: [dpo, shared, _self_]\n")
    assert "shared" in complaint([MODEL], "family", own)
    assert "in the folder above" in complaint([MODEL], "family", own)
    (tmp_path / "shared.yaml").write_text("model: {dpo: {bta: 0.3}}\n")
    assert complaint([MODEL], "family", own) == "shared.yaml: model.dpo.bta: no such key; did you mean model.dpo.beta?"
    assert complaint([MODEL], "famly", own).startswith("--config-name famly: no such config; there are ")
    assert ", family" in complaint([MODEL], "famly", own)


def test_a_folder_of_ones_own_inherits_from_recipes(tmp_path):
    (tmp_path / "base.yaml").write_text("defaults: [dpo, _self_]\nmodel: {optim: {lr: 3e-6}}\n")
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\nmodel: {dpo: {beta: 0.5}}\n")
    config = compose.load_config("mine", [MODEL], tmp_path)
    assert isinstance(config, DPORunConfig)
    assert (config.model.optim.lr, config.model.dpo.beta, config.model.global_batch_size) == (3e-6, 0.5, 128)
    assert compose.load_config("sft", [MODEL], tmp_path).algorithm == "sft"


def test_a_saved_config_is_read_back_equal(tmp_path):
    overrides = [MODEL, "model.aligndistil.dpo_path=d", "model.data.data_prefix.train=[a.jsonl,b.jsonl]"]
    config = compose.load_config("aligndistil", [*overrides, "+exp_manager.wandb_logger_kwargs.tags=[x]"])
    path = tmp_path / "run" / "config.yaml"
    compose.save_resolved(config, path)
    assert compose.load_resolved(path) == config
    assert path.read_text() == compose.to_yaml(config)
    assert os.listdir(path.parent) == ["config.yaml"]
    with pytest.raises(ConfigError, match="no such config file"):
        compose.load_resolved(tmp_path / "config.yaml")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    config = compose.load_config("dpo", [MODEL])
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        compose.save_resolved(config, path)
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["config.yaml"])


def test_describing_needs_no_mandatory_value():
    text = compose.describe_config("dpo", ["model.optim.lr=2e-6"])
    assert "restore_from_path: ???" in text
    assert "lr: 2.0e-06" in text


def test_interpolations_are_resolved(monkeypatch):
    monkeypatch.setenv("MY_MODEL", "there")
    config = compose.load_config("dpo", ["model.restore_from_path=${oc.env:MY_MODEL}"])
    assert config.model.restore_from_path == "there"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.lr=3", "model.lr=3: no such key; did you mean model.optim.lr?"),
        ("+model.lr=3", "+model.lr=3: no such key; did you mean model.optim.lr?"),
        ("trainer.device=2", "trainer.device=2: no such key; did you mean trainer.devices?"),
        ("model.encoder_seq_len=9", "model.encoder_seq_len=9: no such key; did you mean model.encoder_seq_length?"),
        ("foo.bar.baz=1", "foo.bar.baz=1: no such key; --cfg job prints all keys"),
        ("model.aligndistil.alpha=1", "model.aligndistil.alpha=1: a key of aligndistil, not of this run; use"),
        ("model.tdpo.alpha=1", "model.tdpo.alpha=1: a key of tdpo2, not of this run; use --config-name tdpo2"),
        ("exp_manager.wandb_logger_kwargs.tag=x", "write +exp_manager.wandb_logger_kwargs.tag=x to add it"),
        ("trainer.devices=two", "trainer.devices=two: wrong type; expected an integer"),
        ("trainer.devices=2.5", "trainer.devices=2.5: wrong type; expected an integer"),
        ("trainer.devices=null", "trainer.devices=null: null is not allowed; give it an integer"),
        ("model.sequence_parallel=maybe", "model.sequence_parallel=maybe: wrong type; expected true or false"),
        ("model.optim=3", "model.optim=3: wrong type; expected keys below it: model.optim.<key>=<value>"),
        ("model.optim.betas=[0.9,x]", "wrong type; expected a list, each item a number: model.optim.betas=[a,b]"),
        ("model.data.data_prefix.train=a.jsonl", "a list, each item text: model.data.data_prefix.train=[a,b]"),
        ("trainer.devices=1,2", "trainer.devices=1,2: several values; for a list write trainer.devices=[a,b]"),
        ("trainer.devices", "trainer.devices: not a valid override; write key=value"),
        ("~trainer.devices", "~trainer.devices: keys cannot be removed"),
        ("hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings have no effect here"),
        ("algorithm=sft", "algorithm=sft: dpo has another schema; use --config-name sft"),
        ("algorithm=ppp", "algorithm=ppp is not one of sft, dpo, reverse_dpo, "),
        ("exp_manager.name=${oc.env:UNSET_VARIABLE_X}", "Environment variable 'UNSET_VARIABLE_X' not found"),
    ],
)
def test_a_wrong_override_gets_one_line(override, expected):
    assert expected in complaint([override])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defaults: [dpo, _self_]\nmodel: {lr: 1}", "mine.yaml: model.lr: no such key; did you mean model.optim.lr?"),
        ("defaults: [dpo, _self_]\ntrainer: {devices: x}", "mine.yaml: trainer.devices=x: wrong type; expected an int"),
        ("defaults: [dpo, _self_]\nmodel: {dpo: {beta: 1", "mine.yaml:2: not valid YAML"),
        ("defaults: [dppo, _self_]", "'defaults' may name aligndistil, aligndistil_on_policy, "),
        ("trainer: {devices: 1}", "mine.yaml: algorithm=None is not one of sft, dpo, reverse_dpo, "),
        ("[1, 2]", "mine.yaml: "),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, expected):
    (tmp_path / "mine.yaml").write_text(text)
    assert expected in complaint([], "mine", tmp_path)


def test_missing_values_are_named_together():
    text = complaint([], "aligndistil")
    assert text == (
        "model.aligndistil.dpo_path and model.restore_from_path: mandatory, but not set; "
        "add model.aligndistil.dpo_path=<value> model.restore_from_path=<value>"
    )


def test_unknown_names_and_folders(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [dpo]")
    assert complaint([], "nope", tmp_path).endswith(f"there are mine, {', '.join(compose.recipe_names())}")
    assert "--config-dir adds a folder" in complaint([], "nope")
    assert "no such folder" in complaint([], "dpo", tmp_path / "nowhere")
