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

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


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
    """End the child's group: asked first, so that it gives shared memory back, then killed."""
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            child.poll()
            os.killpg(child.pid, 0)
            time.sleep(POLL_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
