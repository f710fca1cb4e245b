"""``aligndistil launch slurm`` on a real Slurm: signals, requeues, a lost node, a chain of jobs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import slurm_cluster
from tests.integration.program import losses, run, write_model, write_pairs
from tests.integration.slurm_cluster import LIMIT_SECONDS, Cluster

STEPS = 40
pytestmark = pytest.mark.skipif(slurm_cluster.why_not() is not None, reason=slurm_cluster.why_not() or "")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's folder: the path of a socket has at most some 100 characters.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder,
        slurm_cluster.running(Path(folder)) as running,
    ):
        yield running


class Setting:
    """A model, data, and the overrides that train on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model", seed=1)
        self.pairs = write_pairs(folder / "pairs.jsonl", 40)

    def overrides(self, log_dir: Path, steps: int) -> tuple[str, ...]:
        return (
            f"model.restore_from_path={self.model}",
            f"model.data.data_prefix.train=[{self.pairs}]",
            f"model.data.data_prefix.validation=[{self.pairs}]",
            f"model.data.cache_dir={self.folder / 'cache'}",
            f"exp_manager.explicit_log_dir={log_dir}",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=5",
            "model.encoder_seq_length=192",
            "model.data.max_prompt_length=96",
            "model.global_batch_size=8",
            "model.micro_batch_size=2",
            "model.optim.lr=1e-3",
            f"trainer.max_steps={steps}",
            "trainer.precision=32",
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("slurm"))


def last_step(log_dir: Path) -> int:
    return max([0, *losses(log_dir)])


@pytest.mark.timeout(600)
def test_a_run_on_two_nodes_that_is_preempted_and_then_loses_a_node_ends_to_the_bit(cluster, setting) -> None:
    whole, log_dir = setting.folder / "whole", setting.folder / "interrupted"
    following = cluster.launch(
        *("--follow", "--config-name", "dpo", *setting.overrides(log_dir, STEPS)),
        *("slurm.nodes=2", "slurm.gpus_per_node=0", "slurm.time=01:00:00"),
    )
    job = cluster.submitted("dpo")
    cluster.wait_until(lambda: last_step(log_dir) >= 2, "the first steps")
    cluster.slurm("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@300 does
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the job is requeued")
    preempted = last_step(log_dir)
    assert 2 <= preempted < STEPS

    cluster.wait_until(lambda: last_step(log_dir) >= preempted + 2, "the steps after the preemption")
    cluster.slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "2", "Slurm requeues the job whose node is lost")
    lost = last_step(log_dir)
    assert preempted < lost < STEPS

    assert following.wait(LIMIT_SECONDS) == 0, cluster.printed
    printed = cluster.printed
    assert f"stopped by SIGUSR1 after step {preempted} of {STEPS}" in printed
    assert "dpo: requeued, to go on from its newest checkpoint" in printed
    assert f"after step {preempted}\n" in printed  # nothing was done twice after the signal
    assert f"job {job}: RUNNING on n[1-2]" in printed
    assert printed.rstrip().endswith(f"job {job}: COMPLETED")

    finished = run(
        *("train", "--config-name", "dpo", *setting.overrides(whole, STEPS)),
        *("trainer.devices=2", "trainer.accelerator=cpu"),
    )
    assert finished.exit_code == 0, finished.errors
    expected = losses(whole)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses(log_dir) == expected


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A program in the place of Python, for what is around it: ends with $CODE, or with 75 when signalled."""
    path = tmp_path / "program"
    path.write_text(
        '#!/usr/bin/env bash\ntrap "exit 75" USR1 TERM\n[[ -z "${CODE:-}" ]] || exit "$CODE"\n'
        'if [[ "${SLURM_RESTART_COUNT:-0}" == 1 ]]; then exit 0; fi\necho waiting\nwhile :; do sleep 0.1; done\n'
    )
    path.chmod(0o755)
    return path


def submit_stand_in(cluster: Cluster, setting: Setting, stand_in: Path, *overrides: str) -> tuple[str, Path]:
    log_dir = stand_in.parent / "a run"  # with a space
    launched = cluster.launch(
        *("--config-name", "dpo", *setting.overrides(Path(f"'{log_dir}'"), 2)),
        *(f"slurm.python={stand_in}", "slurm.gpus_per_node=0", *overrides),
    )
    assert launched.wait(60) == 0, cluster.printed
    job = cluster.submitted("dpo")
    return job, log_dir / "slurm" / f"{job}.log"


def test_a_job_that_fails_or_is_cancelled_is_not_requeued(cluster, setting, stand_in) -> None:
    job, _ = submit_stand_in(cluster, setting, stand_in, "+slurm.environment.CODE='70'")
    cluster.wait_until(lambda: cluster.job(job)["JobState"] == "FAILED", "the job fails")
    assert (cluster.job(job)["ExitCode"], cluster.job(job)["Restarts"]) == ("70:0", "0")

    job, log = submit_stand_in(cluster, setting, stand_in)
    cluster.wait_until(lambda: log.is_file() and "waiting" in log.read_text(), "the program waits")
    cluster.slurm("scancel", job)  # the program answers SIGTERM by 75, as a run does
    cluster.wait_until(lambda: "ended with exit code" in log.read_text(), "the batch file's end")
    cluster.wait_until(lambda: cluster.job(job)["JobState"] == "CANCELLED", "the job is cancelled")
    assert cluster.job(job)["Restarts"] == "0"
    assert "requeued" not in log.read_text()


@pytest.mark.slow
def test_a_job_that_its_time_limit_stops_is_requeued(cluster, setting, stand_in) -> None:
    # Slurm looks for jobs near their end twice a minute, and signals those within a minute of signal_seconds.
    job, log = submit_stand_in(cluster, setting, stand_in, "slurm.time=00:02:00", "slurm.signal_seconds=90")
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the job is requeued before its limit", 110)
    cluster.wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED", "the job ends")
    assert "ended with exit code 75" in log.read_text()


def test_what_slurm_refuses_is_one_line(cluster, setting) -> None:
    launched = cluster.launch(
        *("--config-name", "dpo", *setting.overrides(setting.folder / "refused", 2)),
        *("slurm.gpus_per_node=0", "slurm.partition=nowhere"),
    )
    assert launched.wait(60) == 2
    [line] = [line for line in cluster.printed.splitlines() if "WARNING" not in line]
    assert line.startswith("aligndistil: error: ")
    assert "Slurm refuses the job: sbatch: error: invalid partition specified: nowhere" in line


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_chain_trains_exports_and_evaluates_and_is_not_repeated(cluster, setting) -> None:
    root = setting.folder / "chain"
    arguments = (
        *("--chain", *setting.overrides(root, 4), "slurm.gpus_per_node=0"),
        *("dpo:trainer.max_steps=40", "dpo:model.dpo.beta=0.2", "evaluate:analysis.per_token=true"),
    )
    following = cluster.launch("--follow", *arguments)
    dpo, reverse, aligned = (cluster.submitted(name) for name in ("dpo", "reverse_dpo", "aligndistil"))
    assert dpo.replace("_0", "_1") == reverse
    assert cluster.job(aligned)["JobState"] == "PENDING"
    cluster.wait_until(lambda: last_step(root / "dpo") >= 2, "the first steps")
    cluster.slurm("scancel", "--signal=USR1", "--batch", dpo)  # one of the array alone
    assert following.wait(2 * LIMIT_SECONDS) == 0, cluster.printed
    printed = cluster.printed
    assert printed.count("requeued, to go on from its newest checkpoint") == 1
    assert printed.count("COMPLETED") == 5
    assert printed.index(f"job {dpo}: COMPLETED") < printed.index(f"job {aligned}: RUNNING")
    steps = {name: len(losses(root / name)) for name in ("dpo", "reverse_dpo", "aligndistil")}
    assert steps == {"dpo": 40, "reverse_dpo": 4, "aligndistil": 4}
    assert (root / "huggingface" / "receipt.json").is_file()
    assert "contrastive reward, per token" in (root / "evaluation" / "reward_accuracy.md").read_text()

    again = cluster.launch(*arguments)
    assert again.wait(60) == 0
    assert cluster.printed.count("has ended by these settings") == 5
    assert ": job " not in cluster.printed
