"""The quickstart's stages: a headline with the time left, the command's output as it comes, and a log file of it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypeVar

from megatron_aligndistil.errors import TrainingError
from megatron_aligndistil.launch.failures import PROGRAM, USER_ERROR
from megatron_aligndistil.report.quickstart import Stage

SECONDS_A_MINUTE = 60
EXPECTATION_WEIGHT = 0.25  # of the expectation against what has been seen, as a share of the whole run

Result = TypeVar("Result")


@dataclass
class Stages:
    """Runs stages one after another. ``expected`` maps a stage's name to seconds on the machine it was measured on."""

    expected: Mapping[str, float]
    done: list[Stage] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)
    _expected_done: float = 0.0

    @property
    def seconds(self) -> float:
        """Since the first stage."""
        return time.monotonic() - self._start

    def work(self, name: str, title: str, action: Callable[[], Result]) -> Result:
        """Run ``action`` in this process."""
        with self._stage(name, title, command=""):
            return action()

    def command(self, name: str, title: str, arguments: Sequence[str], log: Path) -> None:
        """Run ``aligndistil <arguments>`` in a process of its own; its output goes to the terminal and to ``log``.

        Raises:
            TrainingError: the command failed.
        """
        typed = shlex.join([PROGRAM, *arguments])
        with self._stage(name, title, command=typed):
            print(f"  $ {typed}", flush=True)
            code, last_line = _run([sys.executable, "-m", "megatron_aligndistil", *arguments], log)
            if code:
                said = f": {last_line}" if code == USER_ERROR else ""
                raise TrainingError(
                    f"'{PROGRAM} {arguments[0]}' exited with {code}{said}; its whole output is in {log}"
                )

    @contextmanager
    def _stage(self, name: str, title: str, command: str) -> Iterator[None]:
        number = len(self.done) + 1
        print(f"\n[{number}/{len(self.expected)}] {title}  ({self._clock()})", flush=True)
        start = time.monotonic()
        yield
        self.done.append(Stage(title, time.monotonic() - start, command))
        self._expected_done += self.expected[name]

    def _clock(self) -> str:
        total = sum(self.expected.values())
        # How this machine compares with the measured one; the first stages are too short to tell alone.
        weight = EXPECTATION_WEIGHT * total
        pace = (self.seconds + weight) / (self._expected_done + weight)
        left = (total - self._expected_done) * pace
        return f"{_minutes(self.seconds)} elapsed, about {_minutes(left)} left"


def _run(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Exit code and last line of ``command``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHONWARNINGS": "ignore", **os.environ, "PYTHONUNBUFFERED": "1"}
    last = "no output"
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        own_handler = signal.signal(signal.SIGTERM, _exit)
        try:
            # Universal newlines: a progress bar's carriage returns end lines too.
            for line in process.stdout:
                file.write(line)
                if line.strip():
                    last = line.strip()
                    print(f"  | {line.rstrip()}", flush=True)
        except BaseException:
            process.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, own_handler)
    return process.returncode, last


def _exit(number: int, _frame: FrameType | None) -> None:
    """Leave by an exception, so that the running command is ended too."""
    sys.exit(128 + number)


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // SECONDS_A_MINUTE}:{whole % SECONDS_A_MINUTE:02d} min"
