"""Who starts the ranks: torchrun or srun around us, we ourselves, or nobody where one process is all.

torch is imported only where ranks are started.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from megatron_aligndistil.config.base_schema import TrainerConfig
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import failures
from megatron_aligndistil.launch.log_folder import cannot_write, log_directory
from megatron_aligndistil.parallel import ports
from megatron_aligndistil.parallel.lifetime import die_with

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

logger = logging.getLogger(__name__)

# torchrun's own variables: where the launchers of several nodes meet, and the name of their meeting.
RENDEZVOUS, RENDEZVOUS_NAME = "PET_RDZV_ENDPOINT", "PET_RDZV_ID"
# A rank whose peer has failed gets this long to leave its own report.
_SHUTDOWN_SECONDS = 10
# A rank notices a signal only once it listens: until it ends it is told again.
_REPEAT_SECONDS = 2.0


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
    if RENDEZVOUS in environment:
        return None  # one of several launchers
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    # A batch script has SLURM_PROCID=0 too, but it is no step: only srun starts one process a task.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and int(tasks) > 1:
        return Placement("srun", _variables_of_slurm(environment, tasks))
    return None


def alone() -> Placement:
    """The only rank, in this process: it meets nobody, so that there is no address."""
    return Placement("none", {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})


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
    if failures.LAUNCHER_PID in os.environ:
        die_with(int(os.environ[failures.LAUNCHER_PID]))
    with _environment({**placement.variables, "LOCAL_WORLD_SIZE": str(trainer.devices)}):
        yield


def launch(command: Sequence[str], config: RunConfig) -> int:
    """Start ``trainer.devices`` ranks on this machine, wait for them, and return the exit code.

    ``command`` is what follows the Python interpreter: ``-m``, a module and its arguments, or a script and its.
    On several nodes each has a launcher, which finds the others by PET_RDZV_ENDPOINT, as torchrun does.
    SIGTERM and SIGUSR1 are passed on to the ranks, which end in their own time; SIGINT ends them.
    A failure is presented as ``failures`` says.
    """
    trainer = config.trainer
    if trainer.num_nodes > 1 and RENDEZVOUS not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes}: no launcher has started this process; start it on every node with "
            f"{RENDEZVOUS}=<first node>:<port> set, or by srun with one task a rank, or by torchrun --nnodes "
            f"{trainer.num_nodes} {' '.join(command[:3] if command[0] == '-m' else command[:1])}"
        )
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    _silence(logging.getLogger("torch.distributed"))
    with _reports_folder(config) as folder, _Forwarding() as forwarding, _kept_signal_handlers():
        own = {
            failures.FAILURES_VARIABLE: str(folder),
            failures.LAUNCHER_PID: str(os.getpid()),
            **_threads(trainer.devices),
        }
        with _environment(own):
            try:
                elastic_launch(_settings(trainer, folder), sys.executable)(*command)
            except ChildFailedError as error:
                exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
                if forwarding.number is not None and set(exit_codes.values()) <= _ends_of(forwarding.number):
                    return _ended_by(forwarding.number)
                return failures.present(folder, exit_codes, failures.launcher_here(), trainer.num_nodes)
            except SignalException as error:
                return _ended_by(error.sigval)
            except (RendezvousError, DistError) as error:  # the launcher that kept the meeting has ended
                if trainer.num_nodes == 1:
                    raise
                print(f"{failures.PROGRAM}: {failures.lost_node(str(error))}", file=sys.stderr, flush=True)
                return failures.BUG
    return 0


def _ends_of(number: int) -> set[int]:
    """Exit codes of ranks that the signal ends: at once, or as Ctrl-C once they have put things in order."""
    return {-number, -signal.SIGTERM, failures.INTERRUPTED}


def _ended_by(number: int) -> int:
    print(f"{failures.PROGRAM}: ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    return 128 + number


def _settings(trainer: TrainerConfig, logs: Path) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    alone = trainer.num_nodes == 1
    endpoint = "127.0.0.1:0" if alone else os.environ[RENDEZVOUS]
    return LaunchConfig(
        min_nodes=trainer.num_nodes,
        max_nodes=trainer.num_nodes,
        nproc_per_node=trainer.devices,
        run_id=uuid.uuid4().hex if alone else os.environ.get(RENDEZVOUS_NAME, "aligndistil"),
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        local_addr="127.0.0.1" if endpoint.startswith("127.0.0.1:") else None,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )


@contextmanager
def _reports_folder(config: RunConfig) -> Iterator[Path]:
    """Where the ranks leave their reports: on several nodes a folder that all of them see."""
    if config.trainer.num_nodes == 1:
        with tempfile.TemporaryDirectory(prefix="aligndistil-") as folder:
            yield Path(folder)
        return
    name = re.sub(r"\W+", "_", f"{os.environ[RENDEZVOUS]}_{os.environ.get(RENDEZVOUS_NAME, '')}")
    shared = log_directory(config.exp_manager) / "reports" / name
    try:
        shared.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(shared.parents[1], error) from error
    yield shared


class _Forwarding:
    """Passes SIGTERM and SIGUSR1 on to the children of this process; ``number`` is the signal that came."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._over = threading.Event()

    def __enter__(self) -> _Forwarding:
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self.number is not None:
            failures.expect_no_more_signals()
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            threading.Thread(target=self._pass_on, args=(number,), daemon=True).start()

    def _pass_on(self, number: int) -> None:
        launcher = psutil.Process()
        while not self._over.is_set():
            for rank in launcher.children():
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)
            self._over.wait(_REPEAT_SECONDS)


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
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
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
    number = 101 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment["SLURM_STEP_ID"])
    port = ports.RANGE[number % len(ports.RANGE)]
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
