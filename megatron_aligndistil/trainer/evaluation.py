"""Evaluation while a run trains: every so many steps the policy answers fixed prompts, and figures are made of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.parallel import collectives, groups, heartbeat
from megatron_aligndistil.trainer.hooks import Hook, Metrics

if TYPE_CHECKING:
    from megatron_aligndistil.trainer.loop import Trainer

logger = logging.getLogger(__name__)

_ANSWERS = "step_{:08d}.jsonl"


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation comes to: figures, the same on every rank, and a row a prompt."""

    metrics: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]


class Evaluator(Protocol):
    """What answers and measures. Every rank makes the same calls; training must not be able to tell."""

    def start(self, step: int) -> None:
        """Before anything is asked; ``step`` steps are done already.

        Raises:
            UserError: an evaluation cannot be made.
        """
        ...

    def evaluate(self, step: int, interrupted: Callable[[], bool]) -> Evaluated | None:
        """The policy as it is after ``step`` steps; None where ``interrupted``, which all ranks ask together."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class EvaluationHook(Hook):
    """Evaluates every ``every_n_steps`` steps, tells all hooks the figures, and keeps the answers in ``folder``.

    Comes after the checkpoint's hook, so that a step is saved before it is evaluated: an evaluation that was cut short
    is made up for when the run goes on.
    """

    def __init__(self, evaluator: Evaluator, every_n_steps: int, before_training: bool, folder: Path) -> None:
        self.evaluator, self.every_n_steps, self.before_training = evaluator, every_n_steps, before_training
        self.folder = folder

    def on_start(self, trainer: Trainer) -> None:
        missing = None
        if groups.world().rank == 0:
            self._discard_after(trainer.step)
            missing = not answers_file(self.folder, trainer.step).exists()
        missing = collectives.from_first_rank(missing)
        self.evaluator.start(trainer.step)
        if missing and (trainer.step or self.before_training):
            self._evaluate_if_due(trainer)

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        self._evaluate_if_due(trainer)

    def close(self) -> None:
        self.evaluator.close()

    def _evaluate_if_due(self, trainer: Trainer) -> None:
        step = trainer.step
        if step % self.every_n_steps:
            return
        for hook in trainer.hooks:
            hook.on_pause(trainer)
        found = self.evaluator.evaluate(step, lambda: trainer.interruption.agreed(trainer.device) is not None)
        heartbeat.beat("after evaluation")
        if found is None:
            logger.info("the evaluation of step %d is put off, since the run is to stop", step)
            trainer.evaluation_put_off = True
            return
        for hook in trainer.hooks:
            hook.on_evaluation(trainer, found.metrics)
        if groups.world().rank == 0:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(answers_file(self.folder, step), text)

    def _discard_after(self, step: int) -> None:
        """Remove the answers of steps that this run repeats."""
        for path in self.folder.glob("step_*.jsonl"):
            if step == 0 or path.name > _ANSWERS.format(step):
                path.unlink()


def answers_file(folder: Path, step: int) -> Path:
    """Where the answers after ``step`` steps are."""
    return folder / _ANSWERS.format(step)
