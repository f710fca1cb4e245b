"""Real ranks under our launcher: what the user sees when they fail, and that none outlives the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.launch.rank import RANKS

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 200.0  # seconds; each takes three to eight on a machine that does nothing else


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    processes = []

    def run(how: str) -> subprocess.Popen[str]:
        keep = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in keep}
        command = [sys.executable, "-m", "tests.unit.launch.rank", how, str(tmp_path)]
        processes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(folder: Path) -> list[int]:
    notes = [path.read_text().split() for path in folder.glob("started-*")]
    return [int(note[0]) for note in notes if len(note) == 2]


@pytest.mark.parametrize(
    ("how", "code", "expected"),
    [
        ("ends well", 0, ""),
        ("same error everywhere", 2, "aligndistil: error: pairs.jsonl:3: not JSON\n"),
        ("error in a collective", 2, "aligndistil: error: rank 1's data\n"),
        ("killed", 1, "aligndistil: rank 1 was ended by SIGKILL (memory ran out, or someone killed it)\n"),
    ],
)
def test_what_the_user_sees(tmp_path, start, how, code, expected):
    process = start(how)
    _, printed = process.communicate(timeout=PATIENCE)
    assert (process.returncode, printed) == (code, expected)
    cores = len(os.sched_getaffinity(0))
    assert {path.read_text().split()[1] for path in tmp_path.iterdir()} == {str(max(1, cores // RANKS))}


def test_a_bug_keeps_the_traceback_of_the_rank_that_has_it(start):
    process = start("bug in a collective")
    _, printed = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "ZeroDivisionError: rank 1's bug" in printed
    assert "ChildFailedError" not in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_the_launcher(tmp_path, start, number):
    process = start("waits")
    wait_for(lambda: len(started(tmp_path)) == RANKS or process.poll() is not None, "the ranks have not started")
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, printed = process.communicate(timeout=PATIENCE)
    wait_for(lambda: not any(map(is_running, started(tmp_path))), "a rank is still running")
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, printed) == (128 + number, f"aligndistil: ended by {number.name}\n")
