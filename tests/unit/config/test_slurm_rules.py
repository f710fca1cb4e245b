"""Settings of Slurm that are taken, and those that are refused in one line."""

from __future__ import annotations

import pytest

from megatron_aligndistil.config import slurm_rules
from megatron_aligndistil.config.compose import load_overrides
from megatron_aligndistil.config.slurm_schema import SlurmConfig, SlurmLaunchConfig
from megatron_aligndistil.errors import ConfigError


def settings(*overrides: str) -> SlurmConfig:
    found = load_overrides(SlurmLaunchConfig, overrides, "slurm_defaults").slurm
    slurm_rules.check(found)
    return found


def test_defaults_and_all_kinds_of_values_are_taken() -> None:
    assert settings() == SlurmConfig()
    found = settings(
        "slurm.nodes=4",
        "slurm.time=2-12:00:00",
        "slurm.container_image='registry#team/image:24.1'",
        "slurm.container_mounts=['/data:/data:ro']",
        "slurm.setup=['module load cuda/12']",
        "+slurm.environment.NCCL_SOCKET_IFNAME=ib0",
        "slurm.extra=['--constraint=h100']",
    )
    assert found.container_image == "registry#team/image:24.1"
    assert found.environment == {"NCCL_SOCKET_IFNAME": "ib0"}
    assert found.setup == ["module load cuda/12"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("slurm.node=1", "slurm.node=1: no such key; did you mean slurm.nodes?"),
        ("slurm.nodes=many", "slurm.nodes=many: wrong type; expected an integer or null"),
        ("slurm.nodes=0", "slurm.nodes=0: out of range; must be at least 1"),
        ("slurm.gpus_per_node=-1", "slurm.gpus_per_node=-1: out of range; must be at least 0"),
        ("slurm.signal_seconds=70000", "slurm.signal_seconds=70000: out of range; must be at most 65535"),
        ("slurm.time=90", "slurm.time=90: not a time limit; write HH:MM:SS or D-HH:MM:SS"),
        ("slurm.time=00:04:59", "slurm.signal_seconds=300: the run would be stopped as soon as it starts"),
        ("slurm.partition=''", "slurm.partition='': must be one line"),
        ("slurm.account='a\"b'", "slurm.account='a\"b': must be one line without double quotes"),
        ("slurm.container_runtime=docker", "slurm.container_runtime=docker: not a value of this key; choose one of"),
        ("slurm.container_runtime=pyxis", "has no effect without slurm.container_image; add it"),
        ("slurm.container_mounts=['/a:/b']", "has no effect without slurm.container_image; add it"),
        ("+slurm.environment.A-B=1", "slurm.environment.A-B=1: not a name of a variable"),
        ("slurm.extra=['constraint=h100']", "slurm.extra: 'constraint=h100': not an option of sbatch"),
    ],
)
def test_what_cannot_be_used_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mount", ["/a", "/a:", "/a:/b,/c:/d", "/a:/b:ro:x"])
def test_mounts_name_two_folders(mount: str) -> None:
    with pytest.raises(ConfigError, match=r"slurm\.container_mounts: .*: write <folder on the node>"):
        settings("slurm.container_image=i.sif", f"slurm.container_mounts=['{mount}']")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("00:00:59", 59),
        ("48:00:00", 172800),
        ("100:00:01", 360001),
        ("1-00", 86400),
        ("2-03:04", 183840),
        ("2-03:04:05", 183845),
        ("90", None),
        ("1:30", None),
        ("1-", None),
        ("a:00:00", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int | None) -> None:
    assert slurm_rules.seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("image", "given", "runtime"),
    [
        (None, None, None),
        ("registry#team/image:24.1", None, "pyxis"),
        ("/images/x.sqsh", None, "pyxis"),
        ("/images/x.sif", None, "apptainer"),
        ("docker://team/image:1", None, "apptainer"),
        ("docker://team/image:1", "pyxis", "pyxis"),
    ],
)
def test_the_image_tells_its_runtime(image: str | None, given: str | None, runtime: str | None) -> None:
    assert slurm_rules.runtime_of(SlurmConfig(container_image=image, container_runtime=given)) == runtime
