"""Processes that keep a subject each and do as they are told, one at a time.

Forked ones share what their parent holds. A subject that fails, dies or hangs says so in its row and disturbs no other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# A call that takes longer counts as hung.
LIMIT_SECONDS = 1800.0
ERROR_LENGTH = 300
EXTRA_PACKAGES = ("liger_kernel", "modelopt")  # of the bench extra


class Failed(Exception):
    """A call failed; the message is one line."""


@dataclass(frozen=True)
class Work:
    """What worker processes are started with.

    make     called in the process with its rank; returns the object whose methods are the commands
    ranks    processes that form one gloo (on a GPU nccl) world; 1: no process group
    threads  of each process
    """

    make: Callable[[int], Any]
    ranks: int = 1
    threads: int = 1
    device: str = "cpu"


class Workers:
    """The processes of one subject. ``ask`` runs a command on all of them at once."""

    def __init__(self, work: Work, method: str = "fork") -> None:
        context: Any = multiprocessing.get_context(method)
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self._processes, self._connections = [], []
        for rank in range(work.ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, work, rank, Path(self._folder.name)), daemon=False)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)
        self.error: str | None = None

    def ask(self, command: str) -> list[Any]:
        """Each rank's answer.

        Raises:
            Failed: a rank did not answer, now or earlier. All have been ended.
        """
        if self.error is None:
            try:
                for connection in self._connections:
                    connection.send(command)
                return self._answers()
            except (Failed, BrokenPipeError) as error:
                self.error = str(error) if isinstance(error, Failed) else self._death(0)
                self.close()
        raise Failed(self.error)

    def _answers(self) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(answers) < len(self._connections):
            waiting = [c for rank, c in enumerate(self._connections) if rank not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Failed(f"no answer within {LIMIT_SECONDS:g} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = self._connections.index(connection)
                try:
                    answers[rank], error = connection.recv()
                except EOFError:
                    raise Failed(self._death(rank)) from None
                if error is not None:
                    raise Failed(error)
        return [answers[rank] for rank in range(len(self._connections))]

    def _death(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(10)
        cause = " (killed, most likely for lack of memory)" if process.exitcode == -signal.SIGKILL else ""
        return f"the process ended with code {process.exitcode}{cause}"

    def close(self) -> None:
        """End the processes and what they started."""
        for process in self._processes:
            if process.is_alive():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # not yet the leader of its group
                    process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()


def one_line(error: BaseException) -> str:
    """An exception as one line of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in EXTRA_PACKAGES:
        text += "; install the bench extra"
    return text[:ERROR_LENGTH]


def _serve(connection: Connection, work: Work, rank: int, folder: Path) -> None:
    os.setsid()
    # Should memory run out, this is what the system is to end.
    Path("/proc/self/oom_score_adj").write_text("1000")
    os.environ.update(TORCHINDUCTOR_COMPILE_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    warnings.simplefilter("ignore")  # packages' notes on import would break the progress bar
    import torch

    torch.set_num_threads(work.threads)
    subject: Any = None
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        try:
            if subject is None:
                if work.ranks > 1:
                    _join_world(work, rank, folder)
                subject = work.make(rank)
            connection.send((getattr(subject, command)(), None))
        except Exception as error:
            if os.environ.get("BENCHMARK_TRACEBACK"):
                traceback.print_exc()
            connection.send((None, one_line(error)))


def _join_world(work: Work, rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    if work.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if work.device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=work.ranks,
        timeout=timedelta(seconds=LIMIT_SECONDS),
    )
