"""SIGKILL or SIGTERM to a random rank at a random moment, over and over in one run: every start goes on to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron_aligndistil.launch.failures import PREEMPTED
from tests.faults.fleet import Fleet, finished, wait_until
from tests.faults.setting import Setting
from tests.faults.table import record
from tests.integration.program import losses

TRIALS = int(os.environ.get("FAULT_TRIALS", "1"))  # of each kind; 'make faults' asks for more
STEPS = 24
# Seconds from a rank's first step to its end; a kill comes at any moment of starting or of these.
SPAN_SECONDS = 3.0


def kill_at_random(setting: Setting, kind: str, log_dir: Path, during_save: bool, rng: random.Random) -> str:
    """Start or go on, kill a rank, wait for the others; returns what the ranks have said."""
    fleet = Fleet.start(log_dir.parent / "output", setting.arguments(kind, log_dir, STEPS))
    if during_save:
        wait_until(lambda: any(log_dir.glob("checkpoints/.step_*")), fleet)
        time.sleep(rng.uniform(0, 0.1))
    else:
        known = losses(log_dir)
        # Half of them while starting or in the first step, half later.
        if rng.random() < 0.5:
            wait_until(lambda: len(losses(log_dir)) != len(known), fleet)
        time.sleep(rng.uniform(0, SPAN_SECONDS))
    fleet.kill_one(rng)
    fleet.wait()
    return fleet.errors()


@pytest.mark.timeout(60 + 60 * TRIALS)
@pytest.mark.parametrize(
    ("fault", "kind", "during_save"),
    [
        ("SIGKILL, pipeline stages", "training", False),
        pytest.param("SIGKILL, sharded optimizer", "sharded", False, marks=pytest.mark.slow),
        ("SIGKILL, rollouts", "rollout", False),
        ("SIGKILL while saving", "training", True),
        pytest.param("SIGKILL while saving a rollout", "rollout", True, marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank(setting: Setting, tmp_path: Path, fault: str, kind: str, during_save: bool) -> None:
    expected, rng = setting.expected(kind, STEPS), random.Random()
    log_dir, survived, identical = tmp_path / "run", 0, 0
    for trial in range(TRIALS):
        said = kill_at_random(setting, kind, log_dir, during_save, rng)
        known = losses(log_dir)
        same = all(expected[step] == loss for step, loss in known.items())
        survived += "aligndistil: error" not in said
        identical += same
        assert same, f"trial {trial}: {known}\n{said}"
        if len(known) == STEPS:  # it had come to its end
            log_dir = tmp_path / f"run_{trial}"
    finished(tmp_path / "output", setting.arguments(kind, log_dir, STEPS))
    assert losses(log_dir) == expected
    record(fault, TRIALS, survived, identical)


@pytest.mark.timeout(60 + 60 * TRIALS)
@pytest.mark.parametrize(
    ("fault", "kind"),
    [("SIGTERM to one rank", "rollout"), pytest.param("SIGTERM, sharded optimizer", "sharded", marks=pytest.mark.slow)],
)
def test_a_rank_that_is_asked_to_stop(setting: Setting, tmp_path: Path, fault: str, kind: str) -> None:
    """Both ranks stop after the same step, none of those that are done is lost."""
    expected, rng = setting.expected(kind, STEPS), random.Random()
    log_dir, survived = tmp_path / "run", 0
    for trial in range(TRIALS):
        arguments = setting.arguments(kind, log_dir, STEPS)
        fleet, known = Fleet.start(tmp_path / "output", arguments), losses(log_dir)
        wait_until(lambda log_dir=log_dir, known=known: len(losses(log_dir)) > len(known), fleet)  # type: ignore[misc]
        time.sleep(rng.uniform(0, SPAN_SECONDS / 4))
        asked = rng.choice(fleet.ranks)
        if asked.is_alive():
            os.kill(asked.pid or 0, signal.SIGTERM)
        codes, done = fleet.wait(), losses(log_dir)
        assert codes in ([PREEMPTED, PREEMPTED], [0, 0]), fleet.errors()
        assert (log_dir / "checkpoints" / f"step_{len(done):08d}").is_dir()
        survived += 1
        if codes == [0, 0]:
            assert done == expected
            log_dir = tmp_path / f"run_{trial}"
    finished(tmp_path / "output", setting.arguments(kind, log_dir, STEPS))
    record(fault, TRIALS, survived, TRIALS * (losses(log_dir) == expected))
