"""What this process is doing and since when, for whoever watches it from another thread."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """A phase that was entered; ``number`` counts them, and is the same on ranks that have done the same."""

    phase: str
    number: int
    started: float  # time.monotonic()

    @property
    def seconds(self) -> float:
        """For how long the phase has lasted."""
        return time.monotonic() - self.started


_beat = Beat("starting", 0, time.monotonic())


def beat(phase: str) -> None:
    """Say that ``phase`` begins."""
    global _beat  # noqa: PLW0603 - one process, one main thread, one beat
    _beat = Beat(phase, _beat.number + 1, time.monotonic())


def current() -> Beat:
    """The last beat."""
    return _beat
