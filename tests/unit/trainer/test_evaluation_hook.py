"""When a run is evaluated, who is told, and what is left behind; and how ranks wait for the first one's work."""

from __future__ import annotations

import json
import signal
import time
from types import SimpleNamespace

import torch

from megatron_aligndistil.errors import Preempted
from megatron_aligndistil.parallel import heartbeat
from megatron_aligndistil.parallel.waiting import made_by_first_rank
from megatron_aligndistil.trainer.evaluation import Evaluated, EvaluationHook
from megatron_aligndistil.trainer.hooks import Hook
from megatron_aligndistil.trainer.interruption import Interruption
from megatron_aligndistil.trainer.loop import LoopSettings, Trainer
from tests.distributed.harness import run_ranks


class Told(Hook):
    def __init__(self) -> None:
        self.figures: list[tuple[int, dict]] = []
        self.paused: list[int] = []

    def on_pause(self, trainer) -> None:
        self.paused.append(trainer.step)

    def on_evaluation(self, trainer, metrics) -> None:
        self.figures.append((trainer.step, dict(metrics)))


class Policy:
    """Answers with the step; stops where it is told to."""

    def __init__(self, stops_at: int = -1) -> None:
        self.stops_at, self.log = stops_at, []

    def start(self, step: int) -> None:
        self.log.append(("start", step))

    def evaluate(self, step, interrupted):
        self.log.append(("evaluate", step))
        return None if step == self.stops_at else Evaluated({"reward_mean": float(step)}, [{"answer": f"é{step}"}])

    def close(self) -> None:
        self.log.append(("close",))


def _trained(folder, start: int, steps: int, before: bool = True, stops_at: int = -1):
    policy, told = Policy(stops_at), Told()
    hook = EvaluationHook(policy, 2, before, folder)
    trainer = SimpleNamespace(step=start, hooks=[told, hook])
    hook.on_start(trainer)
    for trainer.step in range(start + 1, steps + 1):
        hook.on_step(trainer, {})
    hook.close()
    assert [("evaluate", step) for step in told.paused] == [entry for entry in policy.log if entry[0] == "evaluate"]
    return policy.log, [step for step, _ in told.figures]


def _timetable(folder) -> None:
    log, told = _trained(folder, 0, 5, stops_at=4)
    assert told == [0, 2]
    assert log == [("start", 0), *(("evaluate", step) for step in (0, 2, 4)), ("close",)]
    assert [json.loads(path.read_text()) for path in sorted(folder.iterdir())] == [{"answer": "é0"}, {"answer": "é2"}]
    assert _trained(folder, 4, 6)[1] == [4, 6], "what was put off is made up for"
    assert _trained(folder, 4, 4)[1] == [], "and not made twice"
    assert sorted(path.name for path in folder.iterdir()) == [f"step_0000000{step}.jsonl" for step in (0, 2, 4)]
    assert _trained(folder, 0, 1, before=False)[1] == []
    assert not list(folder.iterdir()), "answers of a run that starts afresh are its own"


class Steps(Trainer):
    """Steps of no work."""

    def train_step(self):
        return {}


def _ends(folder, stops_at: int) -> str:
    """What a run of four steps says that gets a signal in an evaluation."""
    interruption = Interruption()

    class Signalled(Policy):
        def evaluate(self, step, interrupted):
            if step == stops_at:
                interruption.received = signal.SIGUSR1
            return super().evaluate(step, interrupted)

    model = SimpleNamespace(chunks=[torch.nn.Linear(1, 1)])
    hook = EvaluationHook(Signalled(stops_at), 2, False, folder)
    settings = LoopSettings(4, 0, False, False, folder)
    source = SimpleNamespace(steps_per_epoch=4)
    try:
        Steps([SimpleNamespace(model=model)], source, settings, [hook], interruption).fit()
    except Preempted as stopped:
        return str(stopped)
    return "done"


def _waits() -> None:
    beats = heartbeat.current().number
    assert made_by_first_rank(lambda stop: time.sleep(2.5) or "made", "judge", lambda: False) == "made"
    assert heartbeat.current().number - beats >= 3
    assert heartbeat.current().seconds < 2.5
    begun = time.monotonic()
    assert made_by_first_rank(lambda stop: stop.wait(60) and None, "judge", lambda: True) is None
    assert time.monotonic() - begun < 30


def test_evaluations_are_made_once_each_in_time(tmp_path):
    run_ranks(1, _timetable, tmp_path)


def test_a_run_whose_last_evaluation_is_put_off_has_stopped(tmp_path):
    """A scheduler starts it again, so that it is made up for."""
    assert run_ranks(1, _ends, tmp_path / "last", 4)[0].startswith("stopped by SIGUSR1 after step 4 of 4")
    assert run_ranks(1, _ends, tmp_path / "before", 2)[0].startswith("stopped by SIGUSR1 after step 2 of 4")
    assert run_ranks(1, _ends, tmp_path / "none", 3) == ["done"]


def test_ranks_beat_while_they_wait_for_the_first_ones_work():
    run_ranks(2, _waits)
