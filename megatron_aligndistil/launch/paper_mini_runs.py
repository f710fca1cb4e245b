"""Training runs as commands, several at a time: each waits for the runs whose models it takes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.errors import ConfigError, TrainingError
from megatron_aligndistil.launch.failures import PROGRAM
from megatron_aligndistil.launch.paper_mini_plan import ENDED, Run

LOG = "output.log"  # beside a run's folder, which the run itself makes
POLL_SECONDS = 0.1
COMMAND = (sys.executable, "-m", "megatron_aligndistil")


@dataclass(frozen=True)
class _Started:
    run: Run
    process: subprocess.Popen[bytes]
    time: float


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Train the runs that haven't ended, up to ``jobs`` at a time, one thread a rank.

    A run that was cut off starts anew. ``runs`` are in an order in which they can be trained.

    Raises:
        ConfigError: a run has ended under another command.
        TrainingError: a run failed; those beside it are ended.
    """
    waiting = [run for run in runs if not has_ended(run)]
    total = len(waiting)
    started: list[_Started] = []
    print(f"{total} of {len(runs)} runs to train, {jobs} at a time", flush=True)
    own_handler = signal.signal(signal.SIGTERM, _exit)
    try:
        while waiting or started:
            for run in [run for run in waiting if all((need / ENDED).is_file() for need in run.needs)]:
                if len(started) < jobs:
                    waiting.remove(run)
                    started.append(_start(run))
            if not started:
                raise RuntimeError(f"{waiting[0].title} waits for a run that isn't among them")
            time.sleep(POLL_SECONDS)
            for one, cpu_seconds in [(one, cpu) for one in started if (cpu := _cpu_seconds(one.process)) is not None]:
                started.remove(one)
                seconds = _finish(one, cpu_seconds)
                done = total - len(waiting) - len(started)
                print(f"  {done}/{total} {one.run.title}: {seconds:.0f} s, {cpu_seconds:.0f} s of CPU", flush=True)
    finally:
        for one in started:
            one.process.terminate()
        for one in started:
            one.process.wait()
        signal.signal(signal.SIGTERM, own_handler)


def has_ended(run: Run) -> bool:
    """Whether the run's model is there.

    Raises:
        ConfigError: it was trained by another command.
    """
    if not run.ended.is_file():
        return False
    if _record(run)["command"] != _command(run):
        raise ConfigError(f"{run.folder}: was trained by another command ({run.ended}); give another --output")
    return True


def cpu_seconds_of(run: Run) -> float:
    """CPU seconds of an ended run, its start and its export included; what runs beside it hardly changes them."""
    return float(_record(run)["cpu_seconds"])


def _record(run: Run) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(run.ended.read_text(encoding="utf-8"))
    return record


def _command(run: Run) -> str:
    return shlex.join((PROGRAM, *run.arguments))


def _log(run: Run) -> Path:
    return run.folder.with_name(f"{run.folder.name}.{LOG}")


def _start(run: Run) -> _Started:
    if run.folder.exists():
        shutil.rmtree(run.folder)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHONWARNINGS": "ignore", **os.environ, "OMP_NUM_THREADS": "1"}
    with _log(run).open("wb") as log:
        process = subprocess.Popen([*COMMAND, *run.arguments], stdout=log, stderr=subprocess.STDOUT, env=environment)
    return _Started(run, process, time.monotonic())


def _cpu_seconds(process: subprocess.Popen[bytes]) -> float | None:
    """CPU seconds of a process and its children once it has ended, when its ``returncode`` is set; None before."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not pid:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def _finish(one: _Started, cpu_seconds: float) -> float:
    """Mark the run as ended. Returns its wall seconds."""
    run, code = one.run, one.process.returncode
    if code:
        lines = _log(run).read_text(encoding="utf-8", errors="replace").splitlines()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        raise TrainingError(f"{run.title}: exited with {code}: {said}; its whole output is in {_log(run)}")
    seconds = time.monotonic() - one.time
    record = {"command": _command(run), "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
    write_text(run.ended, json.dumps(record, indent=2) + "\n")
    return seconds


def _exit(number: int, _frame: FrameType | None) -> None:
    """Leave by an exception, so that the running commands are ended too."""
    sys.exit(128 + number)
