"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def outlive_signals(parent: int) -> None:
    """Leave it to ``parent`` when to end: what asks a whole process group or a job step to stop is not for this one."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with(parent)


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when ``parent`` dies, even of SIGKILL; elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had died before
        os._exit(1)
