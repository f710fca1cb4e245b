"""A small process between the trainer and a vLLM server, so that neither's death leaves anything behind.

Run as a script, with nothing but the standard library: ``python vllm_keeper.py PARENT FOLDER COMMAND…``. It starts
COMMAND in a process group of its own. When that ends, or the process PARENT has died, even of SIGKILL, or SIGTERM
comes, the whole group is ended and FOLDER is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
_TRACKER = b"multiprocessing.resource_tracker"  # ends by itself once those are gone whose shared memory it gives back


def main(arguments: list[str]) -> int:
    """Keep the command until it ends or must end; its exit code, 128 and the signal's number where one ended it."""
    parent, folder, command = int(arguments[0]), arguments[1], arguments[2:]
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: asked.append(received))
    keeper = os.getpid()
    child = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=lambda: _die_with(keeper),  # noqa: PLW1509 - there are no threads
    )
    # The parent's id is looked at rather than a signal asked for: Linux sends that one when the starting thread ends.
    while child.poll() is None and os.getppid() == parent and not asked:
        time.sleep(POLL_SECONDS)
    _end(child)
    shutil.rmtree(folder, ignore_errors=True)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _die_with(keeper: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's group: asked first, then killed; last the processes that give back what shared memory is left."""
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(child.pid, signal.SIGTERM)
        _wait(child)
        for process, command in _members(child.pid):
            if _TRACKER not in command:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        _wait(child)
        os.killpg(child.pid, signal.SIGKILL)


def _wait(child: subprocess.Popen[bytes]) -> None:
    """Until the child's group has ended, which raises ProcessLookupError, or its time is over."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        child.poll()
        os.killpg(child.pid, 0)
        time.sleep(POLL_SECONDS)


def _members(group: int) -> Iterator[tuple[int, bytes]]:
    """Process ids and command lines of a group, as Linux shows them; elsewhere none."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getpgid(int(place.name)) == group:
                yield int(place.name), (place / "cmdline").read_bytes()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
