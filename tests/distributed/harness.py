"""Runs a function on several gloo ranks of this machine: ``run_ranks(4, function, *args)``.

Ranks are forked from a server that has already imported torch, and where there is no GPU the package and
megatron-core too, so that a rank starts in milliseconds. A run that outlasts its time is killed with everything that it
started, and the error names what each rank was doing.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_aligndistil.parallel.ports import free_port

# How long the other ranks may go on after the first failure: a rank that fails by itself reports its own error within
# it, one that waits for the failed rank never would.
GRACE_SECONDS = 3.0


class RanksFailed(AssertionError):
    """One or more ranks failed, died or hung; the message holds every rank's traceback."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """Calls ``function(*args)`` on every rank of a gloo world, one thread each, and returns what each rank returned.

    ``function`` is a module-level function; its arguments and results are pickled (tensors by value). The default
    process group exists when it is called (``dist.get_rank()`` tells the rank); RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them. Raises RanksFailed.
    """
    context = _context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = pickle.dumps((function, args))
        port = free_port()
        ranks = [
            context.Process(
                target=_rank_main, args=(rank, world_size, Path(folder), call, port, timeout_seconds), daemon=False
            )
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            timed_out = _wait(ranks, timeout_seconds)
            if timed_out:
                _ask_for_stacks(ranks)
        finally:
            _kill(ranks)
        if timed_out or any(process.exitcode != 0 for process in ranks):
            raise RanksFailed(_report(ranks, Path(folder), timed_out, timeout_seconds))
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _context() -> Any:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the server, and so by each rank
    context = multiprocessing.get_context("forkserver")
    modules = ["torch", "torch.distributed"]
    if not torch.cuda.is_available():  # with a GPU, importing megatron may initialise CUDA, which must not be forked
        modules.append("megatron_aligndistil.launch.assemble")
    context.set_forkserver_preload(modules)
    return context


def _rank_main(rank: int, world_size: int, folder: Path, call: bytes, port: int, timeout_seconds: float) -> None:
    os.setsid()  # so that killing the rank's group kills what it started too
    with (folder / f"{rank}.stack").open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        _set_environment(rank, world_size, port)
        torch.set_num_threads(1)
        completed = False
        try:
            function, args = pickle.loads(call)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_seconds),
            )
            result = function(*args)
            (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
            dist.barrier()  # a rank that leaves first would reset the connections of one that still works
            completed = True
        finally:
            if not completed:
                (folder / f"{rank}.error").write_text(traceback.format_exc())
                os._exit(1)  # without teardown: destroying a group whose peers hang would hang too
        dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)


def _set_environment(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",  # a host name that doesn't resolve must not matter
    )


def _wait(ranks: list[BaseProcess], timeout_seconds: float) -> bool:
    """Until all ended, or GRACE_SECONDS after the first failure; true where the time ran out."""
    deadline, failed = time.monotonic() + timeout_seconds, False
    while any(process.is_alive() for process in ranks):
        if not failed and any(process.exitcode not in (None, 0) for process in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            return not failed
        time.sleep(0.01)
    return False


def _ask_for_stacks(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)


def _kill(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        if process.pid is None:
            continue
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # ended, or not yet the leader of its group
            process.kill()
        process.join()


def _report(ranks: list[BaseProcess], folder: Path, timed_out: bool, timeout_seconds: float) -> str:
    lines = [f"no end after {timeout_seconds:g} s" if timed_out else "a rank failed"]
    for rank, process in enumerate(ranks):
        error, stack = folder / f"{rank}.error", folder / f"{rank}.stack"
        if error.exists():
            text = error.read_text()
        elif stack.exists() and stack.stat().st_size:
            text = "hung here:\n" + stack.read_text()
        else:
            text = f"no error of its own (exit code {process.exitcode})"
        lines.append(f"--- rank {rank} of {len(ranks)}: {text}")
    return "\n".join(lines)
