"""The same runs through NeMo's ``hydra_runner``: real nemo-toolkit, in the environment that 'make nemo' builds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_aligndistil.config import compose
from tests.integration.program import LIMIT_SECONDS, environment, losses, run, write_model, write_pairs

ROOT = Path(__file__).parents[2]
INTERPRETER = os.environ.get("ALIGNDISTIL_NEMO_PYTHON", str(ROOT / ".venv-nemo/bin/python"))
LAUNCHER = "megatron_aligndistil.launch.nemo"

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not Path(INTERPRETER).exists(),
        reason="no interpreter with NeMo: 'make nemo' builds one, or set ALIGNDISTIL_NEMO_PYTHON",
    ),
]

EVERY_RECIPE = [
    "trainer.devices=4",
    "model.restore_from_path=somewhere",
    "model.tensor_model_parallel_size=2",
    "model.optim.lr=3e-7",
    "model.optim.betas=[0.9,0.999]",
    "model.optim.sched.warmup_steps=7",
    "model.optim.sched.warmup_ratio=null",
    "model.global_batch_size=${multiply:${trainer.devices},32}",
    "model.data.data_prefix.train=[a.jsonl,'b c.jsonl']",
    "exp_manager.name=${algorithm}-${model.seed}",
    "exp_manager.version=3",
    "+exp_manager.wandb_logger_kwargs.tags=[x,y]",
]
# Composes a list of (name, overrides, folder) by hydra_runner and prints what came out, or the error line.
COMPOSE = """
import json, os, sys
from megatron_aligndistil.config import compose
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch.nemo import hydra_runner_composer
answers = []
for name, overrides, folder in json.load(open(sys.argv[1])):
    try:
        answers.append(compose.describe_config(name, overrides, folder, hydra_runner_composer))
    except ConfigError as error:
        answers.append(str(error))
json.dump([answers, os.getcwd(), sys.argv], open(sys.argv[2], "w"))
"""


def nemo(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run NeMo's interpreter in ``folder``, where a stray file of Hydra's would show."""
    given = [INTERPRETER, *map(str, command)]
    variables = {**environment(), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    return subprocess.run(
        given, cwd=folder, env=variables, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )


def described(case: tuple[str, list[str], str | None]) -> str:
    try:
        return compose.describe_config(*case)
    except compose.ConfigError as error:
        return str(error)


def test_both_launchers_resolve_to_the_same(tmp_path):
    own, here = tmp_path / "own", tmp_path / "here"
    (own / "small").mkdir(parents=True)
    here.mkdir()
    (own / "shared.yaml").write_text("defaults: [dpo, _self_]\nmodel: {seed: 5, dpo: {beta: 0.3}}\n")
    (own / "small" / "mine.yaml").write_text("defaults: [shared, _self_]\nmodel: {dpo: {label_smoothing: 0.1}}\n")
    (own / "small" / "saved.yaml").write_text(compose.to_yaml(compose.load_config("kto", EVERY_RECIPE[:2])))
    cases = [(name, EVERY_RECIPE, None) for name in compose.recipe_names()]
    cases += [("dpo", [], None), ("mine", ["model.seed=6"], str(own / "small")), ("saved", [], str(own / "small"))]
    cases += [("shared.yaml", [], str(own / "small")), ("ppo", ["model.ppo.critic.optim.lr=1e-5"], str(own))]
    wrong = [
        "model.lr=3",
        "model.seed=x",
        "hydra.run.dir=elsewhere",
        "model.optim.betas=0.9,0.95",
        "~model.seed",
        "a b=1",
    ]
    cases += [("dpo", [override], None) for override in wrong]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    finished = nemo("-c", COMPOSE, tmp_path / "cases.json", tmp_path / "answers.json", folder=here)
    assert finished.returncode == 0, finished.stderr[-3000:]
    answers, folder, argv = json.loads((tmp_path / "answers.json").read_text())
    for case, answer in zip(cases, answers, strict=True):
        assert answer == described(case), case
    # hydra_runner has left nothing of its own behind.
    assert (Path(folder), argv[1:]) == (here, [str(tmp_path / "cases.json"), str(tmp_path / "answers.json")])
    assert not list(here.iterdir())


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_has_the_same_losses(ranks, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    overrides = [
        *("--config-name", "dpo", f"model.restore_from_path={write_model(tmp_path / 'model', seed=1)}"),
        f"model.data.data_prefix.train=[{write_pairs(tmp_path / 'pairs.jsonl', 16)}]",
        f"model.data.cache_dir={tmp_path / 'cache'}",
        *("model.encoder_seq_length=192", "model.data.max_prompt_length=96", "model.global_batch_size=4"),
        *("model.optim.lr=1e-3", "trainer.precision=32", "trainer.max_steps=3", f"trainer.devices={ranks}"),
    ]
    wandb = ["exp_manager.create_wandb_logger=true", "exp_manager.wandb_logger_kwargs.project=a-project"]
    log_dirs = [tmp_path / "by-nemo", tmp_path / "by-us"]
    by_nemo, by_us = ([*overrides, f"exp_manager.explicit_log_dir={log_dir}"] for log_dir in log_dirs)
    finished = nemo("-m", LAUNCHER, *by_nemo, *(wandb if ranks == 2 else []), folder=here)
    assert finished.returncode == 0, finished.stderr[-3000:]
    ours = run("train", *by_us)
    assert ours.exit_code == 0, ours.errors
    assert len(losses(log_dirs[0])) == 3
    assert losses(log_dirs[0]) == losses(log_dirs[1])
    assert list((log_dirs[0] / "checkpoints").glob("step_*3"))
    assert not list(here.iterdir())
    if ranks == 2:  # NeMo's environment has wandb: the settings reach wandb.init
        (record,) = log_dirs[0].glob("wandb/offline-run-*/run-*.wandb")
        assert b"a-project" in record.read_bytes()


def test_an_error_is_one_line(tmp_path):
    finished = nemo("-m", LAUNCHER, "--config-name", "dpo", "model.lr=3", folder=tmp_path)
    assert finished.returncode == 2
    assert [line for line in finished.stderr.splitlines() if "aligndistil" in line] == [
        "aligndistil: error: model.lr=3: no such key; did you mean model.optim.lr?"
    ]
    assert "Traceback" not in finished.stderr and "HYDRA_FULL_ERROR" not in finished.stderr


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    model, pairs = write_model(tmp_path / "model", seed=1), write_pairs(tmp_path / "pairs.jsonl", 16)
    overrides = [
        *("--config-name", "dpo", f"model.restore_from_path={model}", f"model.data.data_prefix.train=[{pairs}]"),
        *("model.encoder_seq_length=192", "model.data.max_prompt_length=96", "model.global_batch_size=4"),
        *("trainer.precision=32", "trainer.max_steps=2", "trainer.devices=2", "model.tensor_model_parallel_size=2"),
        *(f"exp_manager.explicit_log_dir={tmp_path / 'log'}", f"model.data.cache_dir={tmp_path / 'cache'}"),
    ]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", LAUNCHER)
    finished = nemo(*torchrun, *overrides, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(losses(tmp_path / "log")) == 2
