"""How an error reaches the user: a UserError as one line and exit code 2, a bug with its traceback and exit code 1.

Many ranks meet the same error, or die of one rank's. Under our own launcher each rank leaves a record in a folder, and
the launcher prints the one that came first. Under a foreign launcher the first rank to report prints.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_aligndistil.errors import UserError

PROGRAM = "aligndistil"
FAILURES_VARIABLE = "ALIGNDISTIL_FAILURES"  # the folder of the records, set by our launcher for its ranks
USER_ERROR = 2
BUG = 1
INTERRUPTED = 128 + signal.SIGINT

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


@dataclass(frozen=True)
class Failure:
    """What one rank reported. ``text`` is the line of a UserError or a traceback."""

    rank: int
    seconds: float
    is_user_error: bool
    is_peer_loss: bool
    text: str

    @property
    def explains_others(self) -> tuple[bool, bool, float]:
        """Sorts the cause of the other failures first."""
        return not self.is_user_error, self.is_peer_loss, self.seconds


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
    if folder is not None:
        _record(error, rank, Path(folder))
        return USER_ERROR if isinstance(error, UserError) else BUG
    if not isinstance(error, UserError):
        raise error
    if _reports_first(rank, world_size):
        print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr, flush=True)
    return USER_ERROR


def present(folder: Path, exit_codes: Mapping[int, int]) -> int:
    """Print the failure that explains the others and return the launcher's exit code.

    ``exit_codes`` maps ranks that failed to their exit codes, negative for a signal, as the launcher saw them.
    """
    failures = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank-*.json")]
    failures.sort(key=lambda failure: failure.explains_others)
    killed = {rank: -code for rank, code in exit_codes.items() if code < 0 and -code != signal.SIGTERM}
    if failures and failures[0].is_user_error:
        print(f"{PROGRAM}: error: {failures[0].text}", file=sys.stderr, flush=True)
        return USER_ERROR
    silent = sorted(set(killed) - {failure.rank for failure in failures})
    if silent:  # its peers' tracebacks only say that it went away
        name = signal.Signals(killed[silent[0]]).name
        hint = " (memory ran out, or someone killed it)" if name == "SIGKILL" else ""
        print(f"{PROGRAM}: rank {silent[0]} was ended by {name}{hint}", file=sys.stderr, flush=True)
        return BUG
    if failures:
        first, others = failures[0], len(failures) - 1
        more = f", and {others} more with it" if others else ""
        print(f"{PROGRAM}: rank {first.rank} failed{more}:\n{first.text}", file=sys.stderr, flush=True)
        return BUG
    codes = ", ".join(f"rank {rank} exited with {code}" for rank, code in sorted(exit_codes.items()))
    print(f"{PROGRAM}: {codes} and left no report", file=sys.stderr, flush=True)
    return BUG


def _record(error: BaseException, rank: int, folder: Path) -> None:
    seconds = time.time()
    is_user_error = isinstance(error, UserError)
    is_peer_loss = any(words in str(error) for words in _PEER_LOSS)
    text = one_line(error) if is_user_error else "".join(traceback.format_exception(error)).rstrip()
    failure = Failure(rank, seconds, is_user_error, is_peer_loss, text)
    temporary = folder / f"{rank}.writing"
    temporary.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    os.replace(temporary, folder / f"rank-{rank}.json")
    if not is_user_error:
        time.sleep(_PEER_REPORT_SECONDS)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_EXIT_SECONDS)


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
