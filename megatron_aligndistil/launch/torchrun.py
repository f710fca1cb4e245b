"""Who starts the ranks: torchrun or srun around us, we ourselves, or nobody where one process is all.

torch is imported only where ranks are started.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import failures
from megatron_aligndistil.parallel.lifetime import die_with

logger = logging.getLogger(__name__)

_LAUNCHER_PID = "ALIGNDISTIL_LAUNCHER_PID"


@dataclass(frozen=True)
class Placement:
    """This process among the ranks, in torch's own environment variables."""

    launcher: str
    variables: Mapping[str, str]

    @property
    def rank(self) -> int:
        return int(self.variables["RANK"])

    @property
    def world_size(self) -> int:
        return int(self.variables["WORLD_SIZE"])


def placement_from(environment: Mapping[str, str]) -> Placement | None:
    """Where a launcher has put this process; None where there is no launcher."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Placement("torchrun", _variables_of_torchrun(environment))
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    # A batch script has SLURM_PROCID=0 too, but it is no step: only srun starts one process a task.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and int(tasks) > 1:
        return Placement("srun", _variables_of_slurm(environment, tasks))
    return None


def alone() -> Placement:
    """The only rank, in this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Placement("none", _variables(rank="0", local_rank="0", world_size="1", address=("127.0.0.1", str(port))))


@contextmanager
def entered(placement: Placement, config: RunConfig) -> Iterator[None]:
    """Be the rank that ``placement`` says: torch's environment variables are set inside, and as before afterwards.

    A rank that our launcher started dies with it.
    """
    trainer = config.trainer
    asked = trainer.num_nodes * trainer.devices
    if placement.world_size != asked:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes} x trainer.devices={trainer.devices}: {asked} processes, but "
            f"{placement.launcher} started {placement.world_size}; change the keys or the launcher's number"
        )
    if _LAUNCHER_PID in os.environ:
        die_with(int(os.environ[_LAUNCHER_PID]))
    with _environment({**placement.variables, "LOCAL_WORLD_SIZE": str(trainer.devices)}):
        yield


def launch(command: Sequence[str], config: RunConfig) -> int:
    """Start ``trainer.devices`` ranks on this machine, wait for them, and return the exit code.

    ``command`` is what follows the Python interpreter: ``-m``, a module and its arguments, or a script and its.
    SIGINT and SIGTERM are passed on to the ranks. A failure is presented as ``failures`` says.
    """
    trainer = config.trainer
    if trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes}: no launcher has started this process; start it on every node, "
            f"by srun with one task a rank or by torchrun --nnodes {trainer.num_nodes} -m megatron_aligndistil train"
        )
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence(logging.getLogger("torch.distributed"))
    with tempfile.TemporaryDirectory(prefix="aligndistil-") as folder:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=trainer.devices,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        own = {failures.FAILURES_VARIABLE: folder, _LAUNCHER_PID: str(os.getpid()), **_threads(trainer.devices)}
        with _environment(own), _kept_signal_handlers():
            try:
                elastic_launch(settings, sys.executable)(*command)
            except ChildFailedError as error:
                exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
                return failures.present(Path(folder), exit_codes)
            except SignalException as error:
                print(f"{failures.PROGRAM}: ended by {error.sigval.name}", file=sys.stderr, flush=True)
                return 128 + error.sigval
    return 0


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Put back what torch's agent replaces and leaves behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _variables(rank: str, local_rank: str, world_size: str, address: tuple[str, str]) -> dict[str, str]:
    return {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": address[0],
        "MASTER_PORT": address[1],
    }


def _variables_of_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not; set all, or none of them")
    address = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    return _variables(environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"], address)


def _variables_of_slurm(environment: Mapping[str, str], tasks: str) -> dict[str, str]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    address = environment.get("MASTER_ADDR", first_host(nodes))
    # The same on every rank without asking; steps of one job differ, so that two can run at a time.
    port = 20000 + (101 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment["SLURM_STEP_ID"])) % 12000
    return _variables(
        rank=environment["SLURM_PROCID"],
        local_rank=environment["SLURM_LOCALID"],
        world_size=tasks,
        address=(address, environment.get("MASTER_PORT", str(port))),
    )


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu003`` of ``gpu[003-007,012],cpu1``."""
    match = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,]*)", nodes)
    assert match is not None
    start, numbers, end = match[1], match[2] or "", match[3]
    return start + re.split(r"[,-]", numbers)[0] + end


def _threads(processes: int) -> dict[str, str]:
    """This machine's cores shared among the ranks, unless the user has decided."""
    given = os.environ.get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    threads = given or str(max(1, cores // processes))
    reason = "as given" if given else f"of {cores} cores"
    logger.info("starting %d ranks with OMP_NUM_THREADS=%s (%s)", processes, threads, reason)
    return {"OMP_NUM_THREADS": threads}


def _silence(parent: logging.Logger) -> None:
    """The agent logs a failed rank at length; ``failures`` says it in its place."""
    parent.propagate = False
    parent.handlers[:] = [logging.NullHandler()]
