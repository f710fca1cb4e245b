"""The program as a user runs it: exit codes, one line an error, nothing heavy loaded for it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from megatron_aligndistil import __version__
from megatron_aligndistil.config.compose import recipe_names
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.launch import cli, failures
from megatron_aligndistil.launch.log import configure_logging


def test_module_and_program_are_one():
    command = [sys.executable, "-m", "megatron_aligndistil", "train", "--config-name", "dpo", "model.lr=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "aligndistil: error: model.lr=3: no such key; did you mean model.optim.lr?\n"


def test_the_job_is_printed(capsys):
    given = ["train", "trainer.devices=2", "--config-name", "dpo", "model.optim.lr=2e-6", "--cfg", "job"]
    assert cli.main(given) == 0
    printed = capsys.readouterr().out
    assert "devices: 2\n" in printed
    assert "lr: 2.0e-06\n" in printed


def test_a_folder_of_ones_own(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("defaults: [sft, _self_]\nmodel: {seed: 7}\n")
    assert cli.main(["train", "--config-dir", str(tmp_path), "--config-name", "mine", "--cfg", "job"]) == 0
    assert "seed: 7\n" in capsys.readouterr().out


def test_checks_come_before_any_process(tmp_path, capsys):
    given = ["train", "--config-name", "dpo", f"model.restore_from_path={tmp_path}", "trainer.devices=3"]
    assert cli.main(given) == 2
    assert capsys.readouterr().err.startswith("aligndistil: error: model.global_batch_size=128: not a multiple")


@pytest.mark.parametrize("given", [[], ["nope"], ["train"], ["train", "--config-name", "dpo", "--unknown"]])
def test_a_wrong_command_line(given, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(given)
    assert caught.value.code == 2
    assert "usage: aligndistil" in capsys.readouterr().err


def test_help_and_version(capsys):
    for given in (["--help"], ["train", "--help"], ["launch", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(given)
        assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(command.name in printed for command in cli.COMMANDS)
    assert ", ".join(recipe_names()) in " ".join(printed.split())
    assert __version__ in printed


def test_a_bug_is_raised_and_a_users_error_is_a_line(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", failures.FAILURES_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ZeroDivisionError):
        failures.report(ZeroDivisionError("a bug"))
    assert failures.report(DataError("a.jsonl:1: bad\n  row")) == 2
    assert capsys.readouterr().err == "aligndistil: error: a.jsonl:1: bad row\n"
    assert failures.report(KeyboardInterrupt()) == 130


@pytest.mark.parametrize(("rank", "expected"), [(0, ["INFO    one", "WARNING two"]), (3, ["WARNING [rank 3] two"])])
def test_log_lines(rank, expected, capsys):
    root, package = logging.getLogger(), logging.getLogger("megatron_aligndistil")
    handlers, levels = list(root.handlers), (root.level, package.level)
    try:
        configure_logging(7)
        configure_logging(rank)  # replaces
        logger = logging.getLogger("megatron_aligndistil.trainer.loop")
        logger.info("one")
        logger.warning("two")
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(" ")[2] for line in lines] == expected
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        package.setLevel(levels[1])
