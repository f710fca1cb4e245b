"""The chain: which override goes to which stage, what follows what, what is refused, what isn't repeated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_aligndistil.config import compose
from megatron_aligndistil.launch import cli, slurm_queue
from tests.unit.launch import slurm_stand_ins

# Makes what the real program would: a run's configuration, or a folder.
PROGRAM = """
import json, os, pathlib, sys
argv = sys.argv[3:]
place = pathlib.Path(os.environ["SLURM_STAND_IN"])
with (place / "started").open("a") as log:
    log.write(json.dumps(argv) + "\\n")
values = dict(word.partition("=")[::2] for word in argv if "=" in word)
folder = pathlib.Path(values.get("exp_manager.explicit_log_dir") or values.get("output") or argv[2])
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text("the run's")
(folder / "reward_accuracy.md").touch()
sys.exit(1 if folder.name == os.environ.get("FAILS") else 0)
"""
STAGES = ["dpo", "reverse_dpo", "aligndistil", "export", "evaluate"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    commands = slurm_stand_ins.install(tmp_path / "bin", {**slurm_stand_ins.COMMANDS, "program": PROGRAM})
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_STAND_IN", str(tmp_path / "slurm"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_queue, "_LOG_SECONDS", 0.01)
    (tmp_path / "model").mkdir()
    (tmp_path / "pairs.jsonl").touch()
    return tmp_path


CHAIN = (
    *("launch", "slurm", "--chain", "model.restore_from_path=model", "model.data.data_prefix.train=[pairs.jsonl]"),
    *("model.data.data_prefix.validation=[pairs.jsonl]", "slurm.gpus_per_node=0", "slurm.python=program"),
)


def scripts(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, str]:
    """Job → batch file, as they are printed."""
    assert cli.main([*CHAIN, *overrides, "--print"]) == 0
    parts = re.split(r"^# ==== \S+/(\w+)\.sbatch.*\n", capsys.readouterr().out, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_overrides_reach_the_stages_that_have_them(place, capsys) -> None:
    found = scripts(
        capsys,
        *("model.dpo.beta=0.2", "dpo:model.dpo.label_smoothing=0.1", "model.aligndistil.alpha=30"),
        *("model.optim.lr=2e-6", "aligndistil:slurm.time=02:00:00", "slurm.time=01:00:00"),
        *("model.pipeline_model_parallel_size=2", "trainer.devices=2", "evaluate:analysis.limit=7"),
        "slurm.dependency=afterok:5",
    )
    assert list(found) == ["teachers", "aligndistil", "export", "evaluate"]
    dpo, reverse = re.split(r"^1\)", found["teachers"], flags=re.MULTILINE)
    runs = {"dpo": dpo, "reverse_dpo": reverse, **found}
    placed = {
        "model.dpo.beta=0.2": {"dpo", "reverse_dpo"},
        "model.dpo.label_smoothing=0.1": {"dpo"},
        "model.aligndistil.alpha=30": {"aligndistil"},
        f"model.aligndistil.dpo_path={place}/runs/chain/dpo": {"aligndistil"},
        f"model.aligndistil.reverse_dpo_path={place}/runs/chain/reverse_dpo": {"aligndistil"},
        "model.optim.lr=2e-6": {"dpo", "reverse_dpo", "aligndistil"},
        "model.pipeline_model_parallel_size=2": {"dpo", "reverse_dpo", "aligndistil", "evaluate"},
        "analysis.limit=7": {"evaluate"},
        f"models.dpo={place}/runs/chain/dpo": {"evaluate"},
    }
    for override, stages in placed.items():
        assert {name for name in STAGES if re.search(rf"^ +{re.escape(override)}$", runs[name], re.M)} == stages
    limits = {name: re.search("--time=(.*)", text)[1] for name, text in found.items()}  # type: ignore[index]
    assert limits == dict.fromkeys(found, "01:00:00") | {"aligndistil": "02:00:00"}
    assert {name for name, text in found.items() if "--dependency=afterok:5" in text} == {"teachers"}
    assert "--array=0-1" in found["teachers"]
    assert f"    convert\n    {place}/runs/chain/aligndistil\n    {place}/runs/chain/huggingface\n" in found["export"]


def test_own_recipes_are_found_beside_the_named_one(place, capsys) -> None:
    for name in ("dpo", "reverse_dpo", "aligndistil"):
        (place / f"uf_{name}.yaml").write_text(f"defaults: [{name}, _self_]\nmodel: {{seed: 7}}\n")
    found = scripts(capsys, "--config-dir", ".", "--config-name", "uf_aligndistil")
    assert "--config-name uf_dpo\n" in found["teachers"]
    assert "--config-name uf_reverse_dpo\n" in found["teachers"]
    assert "--config-name uf_aligndistil\n" in found["aligndistil"]


def test_without_held_out_pairs_nothing_is_evaluated(place, capsys) -> None:
    assert list(scripts(capsys, "model.data.data_prefix.validation=[]")) == ["teachers", "aligndistil", "export"]


def test_each_job_waits_for_the_one_before_and_what_has_ended_is_left_out(place, capsys) -> None:
    assert cli.main([*CHAIN, "--follow"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "COMPLETED" in line and "dpo" in line]
    calls = (place / "slurm" / "sbatch").read_text().splitlines()
    waits = [re.search(r"--dependency=(\S+) --kill-on-invalid-dep=yes", call) for call in calls]
    assert [found and found[1] for found in waits] == [None, "afterok:1", "afterok:2", "afterok:3"]
    assert len((place / "slurm" / "started").read_text().splitlines()) == len(STAGES)

    for name in ("dpo", "reverse_dpo", "aligndistil"):  # as a run leaves it, which the stand-in isn't
        folder = place / "runs" / "chain" / name
        made = {"dpo_path": "dpo", "reverse_dpo_path": "reverse_dpo"} if name == "aligndistil" else {}
        overrides = [f"model.aligndistil.{key}={place}/runs/chain/{path}" for key, path in made.items()]
        overrides += [word for word in CHAIN if word.startswith("model.")]
        overrides += [f"exp_manager.name=chain-{name}", f"exp_manager.explicit_log_dir={folder}"]
        overrides += ["exp_manager.resume_if_exists=true", "trainer.accelerator=cpu"]
        assert (folder / "finished.yaml").read_text() == "the run's"
        (folder / "finished.yaml").write_text(compose.to_yaml(compose.load_config(name, overrides)))
    assert cli.main([*CHAIN]) == 0
    assert capsys.readouterr().out.count("has ended by these settings, and is left out") == len(STAGES)
    assert len((place / "slurm" / "sbatch").read_text().splitlines()) == len(calls)
    assert cli.main([*CHAIN, "model.seed=7"]) == 2
    assert f"{place}/runs/chain/huggingface: exported by an earlier chain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.lr=3",), "model.lr=3: no such key; did you mean model.optim.lr?"),
        (("model.aligndistil.dpo_path=x",), "model.aligndistil.dpo_path=x: --chain trains that model itself"),
        (("aligndistil:exp_manager.explicit_log_dir=x",), "follows from the chain's folder; remove it"),
        (("dpo:slurm.time=01:00:00",), "dpo:slurm.time=01:00:00: cannot differ from other stages"),
        (("evaluate:slurm.nodes=1",), "evaluate:slurm.nodes=1: cannot differ from other stages"),
        (("export:model.seed=1",), "export:model.seed=1: the export takes slurm.* only"),
        (("dpo:trainer.devices=2",), "dpo runs on 1 x 2 devices, reverse_dpo on 1 x 1: they are one job array"),
        (("--config-name", "dpo"), "--config-name dpo: with --chain the name of the AlignDistil recipe"),
        (("aligndistil:model.global_batch_size=0",), "model.global_batch_size=0: out of range"),
        (("evaluate:analysis.bootstrap_samples=0",), "analysis.bootstrap_samples=0: out of range"),
        (("export:slurm.time=1",), "slurm.time=1: not a time limit"),
    ],
)
def test_no_stage_is_submitted_where_one_cannot_run(place, capsys, overrides, message) -> None:
    assert cli.main([*CHAIN, *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "slurm").exists()
    assert not (place / "runs").exists()
