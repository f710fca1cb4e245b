"""The scheduler of the miniature on commands that do next to nothing: order, places, what is skipped, what fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_aligndistil.errors import ConfigError, TrainingError
from megatron_aligndistil.launch import paper_mini_runs
from megatron_aligndistil.launch.paper_mini_plan import Run
from megatron_aligndistil.launch.paper_mini_runs import cpu_seconds_of, has_ended, train_all

# Arguments: folder, seconds, exit code. It leaves the times of its start and its end, and how often it was started.
PROGRAM = """
import json, pathlib, sys, time
folder, seconds, code = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
folder.mkdir()
start = time.monotonic()
while time.process_time() < 0.2:
    pass
time.sleep(seconds)
print("last words", flush=True)
(folder / "times.json").write_text(json.dumps([start, time.monotonic()]))
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def sleeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(paper_mini_runs, "COMMAND", (sys.executable, str(tmp_path / "program.py")))


def make(root: Path, name: str, needs: tuple[str, ...] = (), seconds: float = 0.3, code: int = 0) -> Run:
    folder = root / "runs" / name
    return Run(name, folder, (str(folder), str(seconds), str(code)), tuple(root / "runs" / need for need in needs))


def times(run: Run) -> tuple[float, float]:
    start, end = json.loads((run.folder / "times.json").read_text())
    return start, end


def test_runs_wait_for_what_they_need_and_for_a_free_place(tmp_path: Path) -> None:
    first, second, third = (make(tmp_path, name) for name in ("first", "second", "third"))
    last = make(tmp_path, "last", needs=("first", "third"))
    runs = [first, second, third, last]
    train_all(runs, jobs=2)
    assert times(last)[0] > max(times(first)[1], times(third)[1])
    for run in runs:
        start, _ = times(run)
        beside = [other for other in runs if other is not run and times(other)[0] <= start < times(other)[1]]
        assert len(beside) <= 1
        assert has_ended(run) and 0.1 < cpu_seconds_of(run) < 30


def test_what_has_ended_is_not_run_again_and_what_was_cut_off_is(tmp_path: Path) -> None:
    done, cut = make(tmp_path, "done"), make(tmp_path, "cut")
    train_all([done], jobs=1)
    before = times(done)
    cut.folder.mkdir()
    (cut.folder / "metrics.jsonl").write_text("half a run")
    train_all([done, cut], jobs=2)
    assert times(done) == before
    assert has_ended(cut) and not (cut.folder / "metrics.jsonl").exists()


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    train_all([make(tmp_path, "run")], jobs=1)
    with pytest.raises(ConfigError, match=r"run: was trained by another command .*ended\.json.*--output"):
        train_all([make(tmp_path, "run", seconds=0.1)], jobs=1)


def test_a_failed_run_is_told_with_its_last_line_and_ends_the_others(tmp_path: Path) -> None:
    bad, long = make(tmp_path, "bad", code=3), make(tmp_path, "long", seconds=100)
    with pytest.raises(TrainingError, match=r"bad: exited with 3: last words; .*bad\.output\.log"):
        train_all([long, bad], jobs=2)
    assert not has_ended(bad) and not has_ended(long) and not (long.folder / "times.json").exists()
