"""``aligndistil launch slurm`` up to Slurm's commands: what is rendered, submitted, followed and refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_aligndistil.launch import cli, slurm_queue
from megatron_aligndistil.launch.slurm_queue import State, Submitted
from tests.unit.launch import slurm_stand_ins

# In the place of Python on the nodes: ends as the file "codes" says, one number a start.
PROGRAM = """
import os, pathlib, sys
place = pathlib.Path(os.environ["SLURM_STAND_IN"])
assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(os.environ)
with (place / "started").open("a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
print("a line of the run", flush=True)
codes = (place / "codes").read_text().split()
(place / "codes").write_text(" ".join(codes[1:]))
sys.exit(int(codes[0]))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model and pairs in it, and the stand-ins on the PATH."""
    commands = slurm_stand_ins.install(tmp_path / "bin", {**slurm_stand_ins.COMMANDS, "program": PROGRAM})
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_STAND_IN", str(tmp_path / "slurm"))
    monkeypatch.setenv("RANK", "0")  # of a shell that submits
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_queue, "_LOG_SECONDS", 0.01)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "pairs.jsonl").touch()
    return tmp_path


RUN = ("model.restore_from_path=model", "model.data.data_prefix.train=[pairs.jsonl]")
DPO = ("launch", "slurm", "--config-name", "dpo", *RUN)
CPU = "slurm.gpus_per_node=0"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main([*arguments, "--print"]) == 0
    return capsys.readouterr().out


def test_the_batch_file_is_valid_and_says_what_was_asked_for(place, capsys) -> None:
    script = printed(
        capsys,
        *DPO,
        "trainer.devices=8",
        "slurm.nodes=2",
        "slurm.partition=gpu",
        "slurm.time=24:00:00",
        "slurm.setup=['module load cuda']",
        "+slurm.environment.NCCL_SOCKET_IFNAME='ib 0'",
        "slurm.extra=['--constraint=h100']",
        "exp_manager.explicit_log_dir='a folder'",
    )
    for option in (
        "--job-name=dpo",
        "--partition=gpu",
        "--time=24:00:00",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--cpus-per-task=32",
        "--requeue",
        "--signal=B:USR1@300",
        "--open-mode=append",
        f'--output="{place}/a folder/slurm/%j.log"',
        "--constraint=h100",
    ):
        assert f"\n#SBATCH {option}" in script
    for line in (
        "set -e\nmodule load cuda\nset +e",
        "export NCCL_SOCKET_IFNAME='ib 0'",
        "export NCCL_DEBUG=WARN",
        "    trainer.num_nodes=2\n    trainer.devices=8\n    trainer.accelerator=gpu\n",
        f"    'exp_manager.explicit_log_dir='\"'\"'{place}/a folder'\"'\"''\n    exp_manager.resume_if_exists=true\n",
    ):
        assert line in script
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert not (place / "a folder").exists()


def test_containers(place, capsys) -> None:
    mounts = "slurm.container_mounts=['/data:/data:ro']"
    pyxis = printed(capsys, *DPO, "slurm.container_image='registry#team/image:1'", mounts)
    assert "    --container-image='registry#team/image:1'\n" in pyxis
    assert f"    --container-mounts={place}:{place},/data:/data:ro\n" in pyxis
    assert "--container-env=OMP_NUM_THREADS,NCCL_DEBUG," in pyxis
    assert "    python3 -m megatron_aligndistil" in pyxis
    apptainer = printed(capsys, *DPO, "slurm.container_image=/x.sif", mounts)
    assert f"    apptainer exec --nv --bind {place}:{place} --bind /data:/data:ro --pwd {place} /x.sif\n" in apptainer
    assert "--nv" not in printed(capsys, *DPO, "slurm.container_image=/x.sif", CPU)


@pytest.mark.parametrize(
    ("overrides", "devices", "options"),
    [
        ((), 1, {"--gpus-per-node=1", "--cpus-per-task=4"}),
        (("trainer.devices=4",), 4, {"--gpus-per-node=4", "--cpus-per-task=16"}),
        (("slurm.gpus_per_node=4",), 4, {"--gpus-per-node=4", "--cpus-per-task=16"}),
        (("trainer.accelerator=cpu", "trainer.devices=2"), 2, {"--cpus-per-task=2"}),
        (("slurm.gpus_per_node=0", "trainer.devices=2"), 2, {"--cpus-per-task=2"}),
        (("slurm.exclusive=true",), 1, {"--exclusive", "--mem=0"}),
        (("slurm.cpus_per_task=3", "slurm.requeue=false"), 1, {"--cpus-per-task=3", "--no-requeue"}),
    ],
)
def test_devices_and_cores(place, capsys, overrides, devices, options) -> None:
    script = printed(capsys, *DPO, *overrides)
    lines = {line.removeprefix("#SBATCH ").partition("  #")[0] for line in script.splitlines()}
    assert options <= lines
    assert f"    trainer.devices={devices}\n" in script
    assert ("--gpus-per-node" in script) == ("    trainer.accelerator=gpu\n" in script)
    assert ("--exclusive" in lines) != ("--cpus-per-task" in script)
    assert ("scontrol requeue" in script) == ("--requeue" in lines)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.num_nodes=4", "slurm.nodes=2"), "trainer.num_nodes=4: slurm.nodes=2 says otherwise"),
        (("trainer.devices=4", "slurm.gpus_per_node=8"), "trainer.devices=4: slurm.gpus_per_node=8 says otherwise"),
        (("trainer.accelerator=cpu", "slurm.gpus_per_node=8"), "trainer.accelerator=cpu: contradicts slurm.gpus_per"),
        (("trainer.accelerator=gpu", CPU), "trainer.accelerator=gpu: contradicts slurm.gpus_per_node; remove"),
        (("exp_manager.resume_if_exists=false",), "exp_manager.resume_if_exists=false: a requeued job would end"),
        (("exp_manager.create_checkpoint_callback=false",), "a requeued job would begin again; remove it"),
        (("model.lr=3",), "model.lr=3: no such key; did you mean model.optim.lr?"),
        (("model.restore_from_path=nowhere",), "model.restore_from_path=nowhere: no such file or folder"),
        (("slurm.gpus_per_node=3",), "model.global_batch_size=128: not a multiple"),
        (("dpo:model.dpo.beta=1",), "dpo:model.dpo.beta=1: the stages are --chain's"),
        (("slurm.log_dir=pairs.jsonl",), "pairs.jsonl: cannot write there (File exists)"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_submitted(place, capsys, overrides, message) -> None:
    assert cli.main([*DPO, *overrides]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "WARNING" not in line]
    assert len(error) == 1
    assert message in error[0]
    assert not (place / "slurm" / "sbatch").exists()
    assert not (place / "runs").exists()


def test_settings_of_a_site_come_from_a_file(place, capsys) -> None:
    (place / "site.yaml").write_text("defaults: [slurm_defaults, _self_]\nslurm: {account: mine, time: '01:00:00'}\n")
    script = printed(capsys, *DPO, "--slurm-config", "site.yaml", "slurm.time=02:00:00")
    assert "#SBATCH --account=mine\n#SBATCH --time=02:00:00\n" in script
    assert cli.main([*DPO, "--slurm-config", "none.yaml"]) == 2
    assert "--slurm-config none.yaml: no such file; correct the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "code", "starts"), [("0", 0, 1), ("75 138 0", 0, 3), ("75 2", 2, 2), ("70", 70, 1), ("1", 1, 1)]
)
def test_only_what_a_signal_has_stopped_is_requeued(place, capsys, codes, code, starts) -> None:
    (place / "slurm" / "codes").write_text(codes)
    assert cli.main([*DPO, "--follow", "trainer.devices=2", "slurm.nodes=2", "slurm.python=program"]) == code
    output = capsys.readouterr().out
    assert output.count("a line of the run") == output.count("start ") == starts
    assert output.count("requeued, to go on") == starts - 1
    assert f"results: {place}/runs/dpo" in output
    calls = (place / "slurm" / "srun").read_text().splitlines()
    assert len(calls) == starts
    for restart, call in enumerate(calls):
        endpoint, name, threads, *words = call.split()
        assert endpoint.endswith(":20001")
        assert (name, threads) == (f"1-{restart}", "8")
        assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(words)


def test_the_tool_is_the_command(place, capsys) -> None:
    tool = Path(__file__).parents[3] / "tools" / "submit_slurm.py"
    command = [sys.executable, str(tool), *DPO[2:], "--print"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    assert found.returncode == 0, found.stderr
    assert found.stdout == printed(capsys, *DPO)
    found = subprocess.run([*command, "slurm.nodes=0"], capture_output=True, text=True, check=False, cwd=place)
    assert (found.returncode, found.stderr) == (
        2,
        "aligndistil: error: slurm.nodes=0: out of range; must be at least 1\n",
    )


def test_without_slurm_there_is_one_line_and_print_still_works(place, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(place))
    assert cli.main([*DPO]) == 2
    assert "sbatch is not on the PATH; start this where Slurm is installed, or add --print" in capsys.readouterr().err
    assert printed(capsys, *DPO).startswith("#!/usr/bin/env bash\n# Made by: aligndistil launch slurm")


def test_what_slurm_refuses_is_one_line(place, capsys) -> None:
    (place / "slurm" / "refuse").touch()
    assert cli.main([*DPO]) == 2
    assert "Slurm refuses the job: sbatch: error: Batch job submission failed: invalid account; correct" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("JobState=RUNNING ExitCode=0:0 NodeList=n[1-2]", State("RUNNING", 0, "on n[1-2]")),
        ("JobState=PENDING Reason=Dependency ExitCode=0:0", State("PENDING", 0, "(Dependency)")),
        ("JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15", State("TIMEOUT", 143, "(TimeLimit)")),
        ("JobState=CANCELLED ExitCode=0:0", State("CANCELLED", 1)),
        ("JobState=COMPLETED ExitCode=0:0", State("COMPLETED", 0)),
    ],
)
def test_states_are_read(place, state, expected) -> None:
    (place / "slurm" / "7").write_text(state)
    assert slurm_queue.state_of("7") == expected


def test_a_job_that_slurm_has_forgotten_ends_the_following(place, capsys) -> None:
    assert slurm_queue.follow([Submitted("dpo", "9", place / "9.log", place)]) == 1
    assert "job 9: no longer known" in capsys.readouterr().out
    slurm_stand_ins.install(place / "bin", {"sacct": "print('CANCELLED by 1000|0:9')"})
    assert slurm_queue.state_of("9") == State("CANCELLED", 137)


def test_ctrl_c_ends_the_following_only(place, capsys, monkeypatch) -> None:
    def interrupt(_: str) -> State:
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm_queue, "state_of", interrupt)
    assert slurm_queue.follow([Submitted("dpo", "9", place / "9.log", place)]) == 130
    assert "no longer followed; the work goes on (scancel 9 ends it)" in capsys.readouterr().out
