"""Signals that ask a run to stop: Slurm's before a time limit or a preemption, or a person's."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Notes the signals of this process; ``agreed`` is asked between steps, so a step is never cut.

    They may come at any time, on some of the ranks only, and many times over.
    """

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def listening(self) -> Iterator[Interruption]:
        """Take the signals' handlers over; they are given back unless one has come, since more may follow it."""
        before = {number: signal.signal(number, self._note) for number in STOPPING}
        try:
            yield self
        finally:
            if not self.received:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def agreed(self, device: torch.device) -> signal.Signals | None:
        """The signal that any rank has received by now, the same on every rank."""
        number = torch.tensor(self.received, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)) if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
