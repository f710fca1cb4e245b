"""Who has started this process, and what that means for its environment."""

from __future__ import annotations

import os

import pytest

from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import torchrun

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


def config_of(nodes: int, devices: int) -> RunConfig:
    config = RunConfig(algorithm="dpo")
    config.trainer.num_nodes, config.trainer.devices = nodes, devices
    return config


def test_torchrun_is_recognised():
    placement = torchrun.placement_from({**TORCHRUN, **SRUN})  # torchrun inside a Slurm job
    assert placement is not None
    assert (placement.launcher, placement.rank, placement.world_size) == ("torchrun", 3, 4)
    assert placement.variables == TORCHRUN


def test_half_an_environment_is_refused():
    with pytest.raises(ConfigError, match="LOCAL_RANK and MASTER_PORT not"):
        torchrun.placement_from({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"})


def test_srun_becomes_torchs_variables():
    placement = torchrun.placement_from(SRUN)
    assert placement is not None
    assert placement.launcher == "srun"
    given = dict(placement.variables)
    assert 20000 <= int(given.pop("MASTER_PORT")) < 32768  # below Linux's ephemeral ports
    assert given == {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu003"}


def test_steps_of_a_job_get_ports_of_their_own():
    ports = {
        torchrun.placement_from({**SRUN, "SLURM_STEP_ID": str(step)}).variables["MASTER_PORT"] for step in range(8)
    }
    assert len(ports) == 8


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {name: value for name, value in SRUN.items() if "STEP" not in name},  # the batch script itself
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
        {**SRUN, "PET_RDZV_ENDPOINT": "gpu003:29400"},  # a launcher a node
    ],
)
def test_nobody_has_started_ranks(environment):
    assert torchrun.placement_from(environment) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-007,012],cpu1", "gpu003"),
        ("gpu[8,003-007]", "gpu8"),
        ("a1,b[1-2]", "a1"),
        ("rack[1-2]-n", "rack1-n"),
        ("localhost", "localhost"),
    ],
)
def test_first_host(nodes, first):
    assert torchrun.first_host(nodes) == first


def test_a_world_that_is_not_the_configs_is_refused():
    placement = torchrun.placement_from(TORCHRUN)
    assert placement is not None
    with (
        pytest.raises(
            ConfigError, match=r"trainer.num_nodes=1 x trainer.devices=2: 2 processes, but torchrun started 4"
        ),
        torchrun.entered(placement, config_of(1, 2)),
    ):
        pass


def test_the_environment_is_restored(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "old")
    placement = torchrun.alone()
    with torchrun.entered(placement, config_of(1, 1)):
        assert {name: os.environ[name] for name in placement.variables} == dict(placement.variables)
        assert (os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("0", "1")
    assert "RANK" not in os.environ
    assert os.environ["WORLD_SIZE"] == "old"


def test_many_nodes_need_a_launcher():
    with pytest.raises(
        ConfigError,
        match=r"num_nodes=2: no launcher .* PET_RDZV_ENDPOINT.* srun .* torchrun --nnodes 2 -m program evaluate$",
    ):
        torchrun.launch(["-m", "program", "evaluate", "output=o"], config_of(2, 8))


def test_a_rank_alone_meets_nobody():
    """Its run cannot fail for a port that another program has taken."""
    assert set(torchrun.alone().variables) == {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
