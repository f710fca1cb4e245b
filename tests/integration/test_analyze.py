"""``aligndistil analyze`` as a user runs it: files, tables, the same in two ranks, and bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.integration.analysis_setting import TP2, Setting, analyze, rows
from tests.integration.program import run

SHORT = "analysis.sampling.max_new_tokens=6"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("analyze"))


def test_reward_accuracy_by_the_program_in_two_ranks_is_that_of_one(setting: Setting) -> None:
    finished = run("analyze", *setting.rewards("two", *TP2))
    assert finished.exit_code == 0, finished.errors
    analyze(setting, 1, setting.rewards("one"))
    one, two = (rows(setting.folder / name / "reward_accuracy.csv") for name in ("one", "two"))
    assert one == two
    assert {row["set"] for row in one} == {"train", "test"}
    test = {row["quantity"]: row for row in one if row["set"] == "test" and not row["against"]}
    assert list(test)[:3] == ["reward model", "DPO reward", "contrastive reward"]
    for row in test.values():
        assert float(row["value"]) * 9 == pytest.approx(round(float(row["value"]) * 9), abs=1e-6)
        assert float(row["low"]) < float(row["value"]) < float(row["high"]) and row["pairs"] == "9"
    folder = setting.folder / "two"
    text = (folder / "reward_accuracy.md").read_text()
    assert "| contrastive reward − DPO reward" in text and "Wilson" in text
    ElementTree.parse(folder / "reward_accuracy.svg")
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["processes"] == 2 and settings["config"]["analysis"]["beta0"] == 0.1
    assert settings["models"]["models.dpo"] == str(setting.models["dpo"].resolve())


def test_a_missing_model_leaves_its_reward_out_and_says_so(setting: Setting) -> None:
    argv = [part for part in setting.rewards("some", "analysis.limit=5") if "reverse_dpo" not in part]
    analyze(setting, 1, argv)
    text = (setting.folder / "some" / "reward_accuracy.md").read_text()
    assert "Left out: contrastive reward, which needs models.dpo and models.reverse_dpo." in text
    assert "train (5 pairs)" in text and "| contrastive" not in text


def test_tokens_of_greedy_answers(setting: Setting) -> None:
    greedy = ("analysis.responses=greedy", "analysis.max_new_tokens=5", "analysis.limit=2", "analysis.colour=reward")
    analyze(setting, 1, setting.tokens("greedy", *greedy))
    folder = setting.folder / "greedy"
    found = rows(folder / "tokens.csv")
    assert [int(row["position"]) for row in found if row["response"].endswith(":1")] == [1, 2, 3, 4, 5]
    page = (folder / "tokens.html").read_text()
    assert page.count("<span ") == len(found) and "β₀ log π_d/π_r" in page
    assert "## Means over each response" in (folder / "tokens.md").read_text()


def test_extrapolation_trains_what_is_missing_and_compares(setting: Setting) -> None:
    training = {
        "model.restore_from_path": setting.models["model"],
        "model.aligndistil.dpo_path": setting.models["dpo"],
        "model.aligndistil.reverse_dpo_path": setting.models["reverse"],
        "model.data.data_prefix.train": f"[{setting.train}]",
        "model.data.cache_dir": setting.folder / "cache",
        "model.encoder_seq_length": 128,
        "model.data.max_prompt_length": 96,
        "model.global_batch_size": 4,
        "trainer.max_steps": 1,
        "trainer.precision": 32,
        "model.optim.lr": 1e-2,
        "exp_manager.create_tensorboard_logger": "false",
    }
    own = setting.folder / "table3.yaml"
    overrides = "\n".join(f"      - {key}={value}" for key, value in training.items())
    own.write_text(
        "defaults: [extrapolation, _self_]\nanalysis:\n  constants: [1.5]\n  training:\n    overrides:\n"
        + overrides
        + "\n"
    )
    argv = setting.arguments(
        "extrapolation",
        "table3",
        *("--config-name", "table3", "--config-dir", str(setting.folder)),
        f"analysis.prompts=[{setting.test}]",
        "analysis.reward.source=contrastive",
        f"analysis.reward.dpo_path={setting.models['dpo']}",
        f"analysis.reward.reverse_dpo_path={setting.models['reverse']}",
        SHORT,
    )
    finished = run("analyze", *argv)
    assert finished.exit_code == 0, finished.errors
    folder = setting.folder / "table3"
    first = rows(folder / "extrapolation.csv")
    kl = {row["model"]: float(row["value"]) for row in first if row["quantity"] == "KL to the DPO model"}
    assert list(kl) == ["constant 1.5", "adaptive"] and all(value > 0 for value in kl.values())
    assert {"DPO", "constant 1.5", "adaptive"} == {row["model"] for row in first if row["quantity"] == "reward"}
    ElementTree.parse(folder / "extrapolation_trade_off.svg")
    logs = {name: (folder / "variants" / name / "metrics.jsonl") for name in ("constant_1.5", "adaptive")}
    before = {name: path.stat().st_mtime_ns for name, path in logs.items()}
    analyze(setting, 1, argv)  # under a launcher, which may start nothing
    assert rows(folder / "extrapolation.csv") == first
    assert {name: path.stat().st_mtime_ns for name, path in logs.items()} == before
    refused = run("analyze", *argv, "analysis.training.config_name=dpo")
    assert refused.exit_code == 2 and len(refused.error_lines) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reward_accuracy", "output=x"], "analysis.test=[]: no pairs"),
        (["reward_accuracy", "output=x", "analysis.test=[missing.jsonl]"], "missing.jsonl: no such file"),
        (["tokens", "output=x", "models.dpo=nowhere", "models.reverse_dpo=/"], "models.dpo=nowhere: no such file"),
        (["tokens"], "mandatory, but not set"),
        (["reward_accuracy", "output=x", "analysis.beta=1"], "did you mean analysis.beta0?"),
        (["reward_accuracy", "output=x", "--config-name", "mine"], "holds no mine.yaml"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    from megatron_aligndistil.launch import cli

    assert cli.main(["analyze", *arguments]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("aligndistil: error: ")]
    assert words in line
    assert not Path("x").exists()
