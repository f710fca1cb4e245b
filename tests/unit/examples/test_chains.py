"""The scripts of examples/ultrafeedback and examples/tldr with a stand-in for ``aligndistil``."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.examples.stubs import EXAMPLES, run_script, value_of

ALIGNED = ["dpo", "reverse_dpo", "aligndistil", "aligndistil_on_policy"]
BASELINES = ["dpo_001", "kto", "tdpo1", "tdpo2", "simpo"]
ULTRAFEEDBACK = [*ALIGNED, *BASELINES, "reward_model", "ppo", "rto"]
STAGES = {
    ("ultrafeedback", "qwen2-1.5b"): ULTRAFEEDBACK,
    ("ultrafeedback", "qwen2.5-1.5b"): ULTRAFEEDBACK,
    ("ultrafeedback", "qwen2.5-7b"): ["sft", *ULTRAFEEDBACK],
    ("ultrafeedback", "llama3-8b"): ULTRAFEEDBACK,
    ("tldr", "qwen2.5-1.5b"): ["sft", "reward_model", *ALIGNED, "ppo", "rto"],
}
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.sh"))


def script(family: str) -> str:
    return str(EXAMPLES / family / "run.sh")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    return "model"


def test_every_folder_with_configs_is_chained():
    folders = {path.parent.relative_to(EXAMPLES).parts for path in EXAMPLES.rglob("model.yaml")}
    assert folders == set(STAGES)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_scripts_are_valid(path):
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("family", "folder"), STAGES)
def test_each_stage_runs_once(tmp_path, model, family, folder):
    first = run_script(tmp_path, [script(family), folder, "model.seed=7"], MODEL=model)
    assert first.code == 0, first.stderr
    assert first.stages == STAGES[family, folder]
    assert all(argv[-1] == "model.seed=7" for argv in first.trained)
    again = run_script(tmp_path, [script(family), folder, "model.seed=7"], MODEL=model)
    assert (again.code, again.stages) == (0, [])
    assert again.stdout.count(": done (") == len(STAGES[family, folder])


def test_a_chain_that_was_cut_off_goes_on_with_that_stage(tmp_path, model):
    command = [script("ultrafeedback"), "qwen2.5-1.5b"]
    cut = run_script(tmp_path, command, MODEL=model, STUB_CUT_OFF="aligndistil")
    assert (cut.code, cut.stages) == (1, ["dpo", "reverse_dpo", "aligndistil"])
    resumed = run_script(tmp_path, command, MODEL=model)
    assert (resumed.code, resumed.stages) == (0, ULTRAFEEDBACK[2:])


def test_a_stage_without_its_export_ends_the_chain(tmp_path, model):
    ended = run_script(tmp_path, [script("tldr"), "qwen2.5-1.5b"], MODEL=model, STUB_NO_EXPORT="sft")
    assert (ended.code, ended.stages) == (2, ["sft"])
    assert "error: sft ended without runs/tldr/qwen2.5-1.5b/sft/huggingface" in ended.stderr


def test_some_stages_and_data_of_ones_own(tmp_path, model):
    command = [script("ultrafeedback"), "qwen2.5-7b"]
    ended = run_script(tmp_path, command, MODEL=model, STAGES="sft dpo", DATA="uf", SFT_DATA="chat", RUNS="here")
    sft, dpo = ended.trained
    assert value_of(sft, "model.restore_from_path") == "model"
    assert value_of(sft, "model.data.data_prefix.train") == "[chat/train.jsonl]"
    assert value_of(dpo, "model.restore_from_path") == "here/sft/huggingface"
    assert value_of(dpo, "model.data.data_prefix.validation") == "[uf/validation.jsonl]"


def test_a_reward_model_of_another_model_or_run(tmp_path, model):
    command = [script("ultrafeedback"), "qwen2-1.5b"]
    trained = run_script(tmp_path, command, MODEL=model, STAGES="reward_model", REWARD_INITIAL="qwen2.5").trained
    assert value_of(trained[0], "model.restore_from_path") == "qwen2.5"
    given = run_script(tmp_path, command, MODEL=model, STAGES="reward_model ppo rto", REWARD_MODEL="rm")
    assert given.stages == ["ppo", "rto"]
    assert {value_of(argv, "model.reward.path") for argv in given.trained} == {"rm"}


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        ([script("ultrafeedback")], {"MODEL": "m"}, "'' is not a model's folder; there are llama3-8b/ qwen2-1.5b/"),
        ([script("tldr"), "gpt"], {"MODEL": "m"}, "'gpt' is not a model's folder; there are qwen2.5-1.5b/"),
        (
            [script("tldr"), "qwen2.5-1.5b"],
            {"MODEL": "m", "STAGES": "kto"},
            "STAGES: kto is not a stage; there are sft",
        ),
        ([script("tldr"), "qwen2.5-1.5b"], {}, "set MODEL to the folder of the base model"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, command, variables, message):
    ended = run_script(tmp_path, command, **variables)
    assert ended.code != 0
    assert ended.stages == []
    assert message in ended.stderr


def test_under_slurm_every_stage_is_a_job_that_the_script_waits_for(tmp_path, model):
    command = [script("ultrafeedback"), "llama3-8b", "model.seed=7"]
    slurm = "aligndistil launch slurm --follow slurm.nodes=2 slurm.exclusive=true"
    ended = run_script(tmp_path, command, MODEL=model, STAGES="dpo reverse_dpo aligndistil", TRAIN=slurm)
    assert ended.code == 0, ended.stderr
    assert ended.stages == ["dpo", "reverse_dpo", "aligndistil"]
    for argv in ended.trained:
        assert "model.seed=7" in argv
        assert (value_of(argv, "trainer.num_nodes"), value_of(argv, "trainer.devices")) == ("2", "8")
    calls = [call.split() for call in (tmp_path / "slurm" / "srun").read_text().splitlines()]
    assert len(calls) == 3
    assert all({"--nodes=2", "--ntasks=2"} <= set(call) for call in calls)
    cut = run_script(tmp_path, command, MODEL=model, STAGES="kto tdpo1", TRAIN=slurm, STUB_CUT_OFF="kto")
    assert (cut.code, cut.stages) == (1, ["kto"])
