"""What NeMo's users meet first: its keys for the log folder, the translator, the launcher without NeMo."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from megatron_aligndistil.config.base_schema import ExpManagerConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import cli, nemo
from megatron_aligndistil.launch.log_folder import log_directory


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({}, "runs/mine"),
        ({"version": "v2"}, "runs/mine/v2"),
        ({"exp_dir": "/results"}, "/results/mine"),
        ({"exp_dir": "/results", "version": "v2"}, "/results/mine/v2"),
        ({"explicit_log_dir": "/results/here"}, "/results/here"),
        ({"explicit_log_dir": "~/here"}, "/home/me/here"),
        ({"exp_dir": "~"}, "/home/me/mine"),
    ],
)
def test_log_directory(given, folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert log_directory(ExpManagerConfig(name="mine", **given)) == Path(folder)


@pytest.mark.parametrize("key", ["exp_dir", "version"])
def test_a_folder_that_is_named_twice_is_refused_before_any_rank(key, tmp_path, capsys):
    (tmp_path / "data.jsonl").touch()
    given = [
        *("train", "--config-name", "dpo", "trainer.devices=2", f"model.restore_from_path={tmp_path}"),
        f"model.data.data_prefix.train=[{tmp_path / 'data.jsonl'}]",
        *(f"exp_manager.explicit_log_dir={tmp_path / 'log'}", f"exp_manager.{key}=other"),
    ]
    assert cli.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"exp_manager.{key}=other: has no effect with exp_manager.explicit_log_dir=" in line
    assert not (tmp_path / "log").exists()


@pytest.mark.skipif(importlib.util.find_spec("nemo") is not None, reason="nemo-toolkit is installed here")
def test_without_nemo_the_launcher_says_what_to_install(capsys):
    assert nemo.main(["--config-name", "dpo", "--cfg", "job"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "nemo-toolkit cannot be imported" in line and "install the extra 'nemo'" in line


def test_the_translator_writes_a_new_file_only(tmp_path, capsys):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("trainer: {dpo: {max_epochs: 3, val_check_interval: 0.5}}\n")
    assert cli.main(["config-from-nemo", str(old), "--output", str(new)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no equal: trainer.dpo.val_check_interval=0.5: a share of an epoch" in printed.err
    assert yaml.safe_load(new.read_text())["trainer"] == {"max_epochs": 3}

    assert cli.main(["config-from-nemo", str(old), "--algorithm", "reverse_dpo"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["defaults"] == ["reverse_dpo", "_self_"]

    before = new.read_bytes()
    for given, message in (
        ([str(old), "--output", str(new)], "exists; name another file"),
        ([str(old), "--output", str(tmp_path / "none" / "new.yaml")], "no folder"),
        ([str(tmp_path / "missing.yaml")], "no such file"),
    ):
        assert cli.main(["config-from-nemo", *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("aligndistil: error: ") and message in line
    assert new.read_bytes() == before


def test_the_launcher_is_told_apart_from_a_broken_one(monkeypatch):
    """A module that NeMo lacks is named, so that nobody installs again what is there."""
    monkeypatch.setitem(sys.modules, "nemo.core.config", None)
    with pytest.raises(ConfigError, match=r"cannot be imported \(.*nemo"):
        nemo._hydra_runner()
