"""Every YAML below examples/: what the chained stages compose to, and that it is what was published."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_aligndistil.config import compose
from megatron_aligndistil.config.checks import check, check_model
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.launch import slurm
from tests.unit.examples.stubs import EXAMPLES, run_script
from tests.unit.examples.test_chains import STAGES, script

FILES = sorted(EXAMPLES.rglob("*.yaml"))
ALPHA = re.compile(r"alpha: ([\d.]+)\}\}\s+# the authors' ([\d.]+), with their TVD of range \[0, 2\]")
AUTHORS_ALPHA = {  # off-policy, on-policy
    ("ultrafeedback", "qwen2-1.5b"): (10, 20),
    ("ultrafeedback", "qwen2.5-1.5b"): (15, 15),
    ("ultrafeedback", "qwen2.5-7b"): (15, 15),
    ("ultrafeedback", "llama3-8b"): (15, 15),
    ("tldr", "qwen2.5-1.5b"): (1, 2),
}


@dataclass(frozen=True)
class Shape:
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    max_position_embeddings: int


SHAPES = {
    "qwen2-1.5b": Shape(28, 12, 2, 8960, 32768),
    "qwen2.5-1.5b": Shape(28, 12, 2, 8960, 32768),
    "qwen2.5-7b": Shape(28, 28, 4, 18944, 131072),
    "llama3-8b": Shape(32, 32, 8, 14336, 8192),
}


@dataclass(frozen=True)
class Chain:
    """The arguments of ``aligndistil train`` of each stage; the folders that they name exist in ``where``."""

    where: Path
    stages: dict[str, list[str]]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Chain]:
    found = {}
    for family, folder in STAGES:
        where = tmp_path_factory.mktemp("chain")
        (where / "model").mkdir()
        ended = run_script(where, [script(family), folder], MODEL="model")
        assert ended.code == 0, ended.stderr
        found[family, folder] = Chain(where, dict(zip(ended.stages, ended.trained, strict=True)))
    return found


def composed(argv: list[str]) -> Any:
    assert (argv[0], argv[2]) == ("--config-dir", "--config-name")
    config = compose.load_config(argv[3], argv[4:], argv[1])
    assert isinstance(config, RunConfig)
    check(config)
    return config


@pytest.mark.parametrize(
    ("family", "folder", "stage"), [(*place, stage) for place, stages in STAGES.items() for stage in stages]
)
def test_stages_compose_pass_the_checks_and_have_the_published_settings(chains, monkeypatch, family, folder, stage):
    chain = chains[family, folder]
    monkeypatch.chdir(chain.where)  # paths are relative to it
    config = composed(chain.stages[stage])
    model, trainer = config.model, config.trainer
    check_model(config, SHAPES[folder])
    assert config.exp_manager.name == stage
    assert (trainer.devices, trainer.num_nodes, trainer.max_epochs) == (8, 1, 1)
    assert (config.exp_manager.resume_if_exists, model.sequence_parallel) == (True, True)
    assert config.exp_manager.checkpoint_callback_params.export_hf_on_train_end
    lr = 2e-5 if stage == "sft" else 1e-6
    assert (model.global_batch_size, model.encoder_seq_length, model.optim.lr) == (128, 2048, lr)
    assert (model.optim.sched.warmup_ratio, model.optim.sched.min_lr) == (0.1, pytest.approx(lr / 10))
    check_algorithm(config, family, folder, stage)


def check_algorithm(config: Any, family: str, folder: str, stage: str) -> None:
    model, is_tldr = config.model, family == "tldr"
    if stage in ("dpo", "reverse_dpo", "dpo_001"):
        assert config.algorithm == ("reverse_dpo" if stage == "reverse_dpo" else "dpo")
        assert model.dpo.beta == (0.01 if stage == "dpo_001" else 0.1)
    elif stage in ("kto", "tdpo1", "tdpo2", "simpo", "sft", "reward_model"):
        assert config.algorithm == stage
    elif stage.startswith("aligndistil"):
        on_policy = stage.endswith("on_policy")
        authors = AUTHORS_ALPHA[family, folder][on_policy]
        assert (model.aligndistil.alpha, model.aligndistil.tvd_scale) == (2 * authors, 1.0)
        assert (model.aligndistil.epsilon, model.aligndistil.beta0) == (1e-3, 0.1)
        assert (model.aligndistil.reward, model.aligndistil.weight) == ("contrastive", "adaptive")
        assert model.aligndistil.source == ("rollout" if on_policy else "dataset")
        assert (Path(model.aligndistil.dpo_path).parent.name, model.data.responses) == ("dpo", "chosen")
        assert Path(model.aligndistil.reverse_dpo_path).parent.name == "reverse_dpo"
    else:
        critic = model.ppo.critic.optim
        assert (config.algorithm, model.ppo.kl_coef) == (stage, 0.07 if is_tldr else 0.01)
        assert (critic.lr, critic.sched.min_lr, critic.sched.warmup_ratio) == (9e-6, 9e-7, 0.1)
        assert (model.rollout.prompts_per_rollout, model.reward.source) == (1024, "model")
        assert Path(model.reward.path).parent.name == "reward_model"
        if stage == "rto":
            assert model.rto.beta1 == (0.1 if is_tldr else 0.01)
            assert Path(model.rto.dpo_path).parent.name == "dpo"
    if stage in ("aligndistil_on_policy", "ppo", "rto"):
        rollout = model.rollout
        assert (rollout.engine, rollout.max_new_tokens, model.data.max_prompt_length) == ("vllm", 1024, 1024)
        assert (rollout.temperature, rollout.top_p, rollout.samples_per_prompt) == (1.0, 1.0, 1)
        assert SHAPES[folder].num_attention_heads % rollout.vllm.tensor_parallel_size == 0


def test_alphas_are_twice_what_their_comments_say_of_the_authors():
    files = [path for path in FILES if re.fullmatch("(uf|tldr)_aligndistil(_on_policy)?", path.stem)]
    assert len(files) == 2 * len(STAGES)
    for path in files:
        found = ALPHA.search(path.read_text(encoding="utf-8"))
        assert found is not None, f"{path}: alpha stands without the authors' figure"
        off, on = AUTHORS_ALPHA[path.parts[-3], path.parts[-2]]
        assert float(found[2]) == (on if path.stem.endswith("on_policy") else off)
        assert float(found[1]) == 2 * float(found[2])


@pytest.mark.parametrize("name", ["distributional", "token_scalar", "sentence_level"])
def test_the_convergence_runs_compose_and_pass_the_checks(tmp_path, name):
    section = "aligndistil" if name == "distributional" else "pg"
    values = ("restore_from_path", f"{section}.dpo_path", f"{section}.reverse_dpo_path")
    data = f"model.data.data_prefix.train=[{tmp_path}]"
    config = compose.load_config(name, [*(f"model.{key}={tmp_path}" for key in values), data], EXAMPLES / "convergence")
    check(config)


def test_every_file_is_short():
    assert len(FILES) > len(STAGES)
    assert {path for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 30} == set()


@pytest.mark.parametrize("prefix", ["uf", "tldr"])
def test_every_file_belongs_to_a_run(prefix):
    """A file of a family is a stage's, or inherited from by one."""
    family = {"uf": "ultrafeedback", "tldr": "tldr"}[prefix]
    files = [path for path in FILES if family in path.parts]
    stages = {f"{prefix}_{stage}" for place, names in STAGES.items() if place[0] == family for stage in names}
    inherited = set()
    for path in files:
        inherited |= set(yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", []))
    assert {path.stem for path in files} <= stages | inherited


def test_the_family_is_a_chain_of_slurm_jobs(tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    configs = str(EXAMPLES / "ultrafeedback" / "qwen2.5-1.5b")
    argv = ["slurm", "--chain", "--print", "--config-dir", configs, "--config-name", "uf_aligndistil", "slurm.nodes=2"]
    assert slurm.main([*argv, "model.restore_from_path=model"]) == 0
    printed = capsys.readouterr().out
    for stage in ("dpo", "reverse_dpo", "aligndistil"):
        assert f"    --config-name uf_{stage}\n" in printed
    assert printed.count("#SBATCH --gpus-per-node=8\n") == 2 + ("/evaluate.sbatch" in printed)
