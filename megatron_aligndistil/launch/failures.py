"""How an end reaches the user: a UserError as one line and exit code 2, a bug with its traceback and exit code 1, a run
that was asked to stop as one line and exit code 75, one that hung with where every rank was and exit code 70.

Many ranks meet the same error, or die of one rank's. Under our own launcher each rank leaves a record in a folder, and
the launcher prints the one that came first; launchers of several nodes share the folder, and the one whose rank it was
prints it whole. Under a foreign launcher the first rank to report prints.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_aligndistil.errors import Preempted, UserError

PROGRAM = "aligndistil"
FAILURES_VARIABLE = "ALIGNDISTIL_FAILURES"  # the folder of the records, set by our launcher for its ranks
LAUNCHER_PID = "ALIGNDISTIL_LAUNCHER_PID"
USER_ERROR = 2
BUG = 1
INTERRUPTED = 128 + signal.SIGINT
# sysexits.h: EX_SOFTWARE, and EX_TEMPFAIL ("try again later"), which a batch script answers by requeueing the job.
HUNG = 70
PREEMPTED = 75

# A rank whose peer went away may report before the peer, which is still unwinding: wait for it, and rank it lower.
_PEER_REPORT_SECONDS = 1.0
_PEER_LOSS = (
    "by peer",
    "remote worker",
    "remote process",
    "Broken pipe",
    "Socket Timeout",
    "NCCL communicator was aborted",
)
# Without a store to ask, other ranks than 0 wait for the launcher to end them after rank 0 has printed.
_RANK_0_REPORT_SECONDS = 3.0
# A failed rank that hangs while Python or a communication library shuts down would keep the others waiting.
_EXIT_SECONDS = 15


Kind = Literal["user error", "hang", "bug", "peer loss", "preemption"]
# The first kinds explain the later ones.
_EXIT_CODES: dict[Kind, int] = {"user error": USER_ERROR, "hang": HUNG, "bug": BUG, "peer loss": BUG, "preemption": 75}


@dataclass(frozen=True)
class Failure:
    """What one rank reported. ``text`` is one line, or a traceback."""

    rank: int
    seconds: float
    kind: Kind
    text: str
    launcher: str = ""  # of the rank; each node of several has one

    @property
    def exit_code(self) -> int:
        """What the rank and its launcher exit with."""
        return _EXIT_CODES[self.kind]

    @property
    def explains_others(self) -> tuple[int, float]:
        """Sorts the cause of the other failures first."""
        return list(_EXIT_CODES).index(self.kind), self.seconds

    def save(self, folder: Path) -> None:
        """Leave the record for the launcher."""
        temporary = folder / f"{self.rank}.writing"
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(temporary, folder / f"rank-{self.rank}.json")


def one_line(error: BaseException) -> str:
    """The message of a UserError with its white space folded."""
    return " ".join(str(error).split())


def report(error: BaseException) -> int:
    """Print or record what ended this process and return its exit code; bugs outside our launcher are raised again."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
    folder = os.environ.get(FAILURES_VARIABLE)
    if isinstance(error, Preempted):
        expect_no_more_signals()
    if folder is not None:
        return _record(error, rank, Path(folder))
    if not isinstance(error, UserError | Preempted):
        raise error
    prefix, code = ("", PREEMPTED) if isinstance(error, Preempted) else ("error: ", USER_ERROR)
    if _reports_first(rank, world_size):
        print(f"{PROGRAM}: {prefix}{one_line(error)}", file=sys.stderr, flush=True)
    return code


def expect_no_more_signals() -> None:
    """Those who ask a run to stop may ask again while it exits, when Python's handlers are gone already."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def launcher_here() -> str:
    """The name of this rank's launcher, or of this process as one."""
    return f"{socket.gethostname()}:{os.environ.get(LAUNCHER_PID, os.getpid())}"


def leave(kind: Kind, text: str) -> None:
    """Record what ends this rank, or print it where no launcher of ours will."""
    folder = os.environ.get(FAILURES_VARIABLE)
    if folder is None:
        print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)
        return
    Failure(int(os.environ["RANK"]), time.time(), kind, text, launcher_here()).save(Path(folder))


def present(folder: Path, exit_codes: Mapping[int, int], launcher: str = "", nodes: int = 1) -> int:
    """Print the failure that explains the others and return the launcher's exit code.

    ``exit_codes`` maps ranks of this ``launcher`` that failed to their exit codes, negative for a signal; each of
    ``nodes`` has a launcher.
    """
    failures = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank-*.json")]
    failures.sort(key=lambda failure: failure.explains_others)
    killed = {rank: -code for rank, code in exit_codes.items() if code < 0 and -code != signal.SIGTERM}
    silent = sorted(set(killed) - {failure.rank for failure in failures})
    if silent and (not failures or failures[0].kind in ("bug", "peer loss")):
        # Its peers' tracebacks only say that it went away.
        name = signal.Signals(killed[silent[0]]).name
        hint = " (memory ran out, or someone killed it)" if name == "SIGKILL" else ""
        print(f"{PROGRAM}: rank {silent[0]} was ended by {name}{hint}", file=sys.stderr, flush=True)
        return BUG
    if failures:
        print(f"{PROGRAM}: {_told(failures, launcher, nodes)}", file=sys.stderr, flush=True)
        return failures[0].exit_code
    codes = ", ".join(f"rank {rank} exited with {code}" for rank, code in sorted(exit_codes.items()))
    print(f"{PROGRAM}: {codes} and left no report", file=sys.stderr, flush=True)
    return BUG


def lost_node(reason: str) -> str:
    """What the other nodes say."""
    return f"a rank or the launcher of another node was lost; that node's log says why ({reason})"


def _told(failures: list[Failure], launcher: str, nodes: int) -> str:
    first, others = failures[0], len(failures) - 1
    if first.kind == "preemption":  # every rank says the same, and another node's launcher may be gone already
        return next((own.text for own in failures if own.launcher == launcher), first.text)
    if first.launcher != launcher:
        return f"ended with rank {first.rank}, whose node's log says why"
    if first.kind == "user error":
        return f"error: {first.text}"
    if first.kind == "hang":
        return first.text
    if first.kind == "peer loss" and nodes > 1:
        return lost_node(first.text.splitlines()[-1])
    more = f", and {others} more with it" if others else ""
    return f"rank {first.rank} failed{more}:\n{first.text}"


def _record(error: BaseException, rank: int, folder: Path) -> int:
    kind: Kind = "bug"
    if isinstance(error, Preempted):
        kind = "preemption"
    elif isinstance(error, UserError):
        kind = "user error"
    elif any(words in str(error) for words in _PEER_LOSS):
        kind = "peer loss"
    in_full = kind in ("bug", "peer loss")
    text = "".join(traceback.format_exception(error)).rstrip() if in_full else one_line(error)
    failure = Failure(rank, time.time(), kind, text, launcher_here())
    failure.save(folder)
    if in_full:
        time.sleep(_PEER_REPORT_SECONDS)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_EXIT_SECONDS)
    return failure.exit_code


def _reports_first(rank: int, world_size: int) -> bool:
    if world_size == 1:
        return True
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        try:
            return distributed.distributed_c10d._get_default_store().add("aligndistil/failures", 1) == 1
        except RuntimeError:  # rank 0, which holds the store, has gone and has said why
            return rank == 0
    if rank != 0:
        time.sleep(_RANK_0_REPORT_SECONDS)
    return True
