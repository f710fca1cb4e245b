"""The training loop: batches, frozen passes, the policy's pass, the optimizer, hooks."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.errors import Preempted, TrainingError
from megatron_aligndistil.parallel import groups
from megatron_aligndistil.trainer.hooks import Hook
from megatron_aligndistil.trainer.interruption import Interruption
from megatron_aligndistil.trainer.metrics import PhaseClock, Totals, WorldMetrics, peak_memory_gib
from megatron_aligndistil.trainer.objective import Learner
from megatron_aligndistil.trainer.source import BatchSource
from megatron_aligndistil.types import Batch, LossOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSettings:
    """When the loop validates and stops."""

    total_steps: int
    val_check_interval: int
    val_before_training: bool
    val_after_training: bool
    log_dir: Path


class Trainer:
    """Runs one algorithm. ``step`` counts finished optimizer steps.

    learners      what is trained, all on the same micro-batches: the policy first
    interruption  asked before every step whether to stop there
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        source: BatchSource,
        settings: LoopSettings,
        hooks: Sequence[Hook],
        interruption: Interruption | None = None,
    ) -> None:
        self.learners = list(learners)
        self.source = source
        self.settings = settings
        self.hooks = hooks
        self.interruption = interruption or Interruption()
        self.step = 0
        self.evaluation_put_off = False  # by the hook that evaluates, since the run is to stop
        self.device = next(self.learners[0].model.chunks[0].parameters()).device
        self._world = WorldMetrics(self.device)
        self._validated_at = -1

    @property
    def epoch(self) -> float:
        """Epochs done, with the current one's share."""
        return self.step / self.source.steps_per_epoch

    def fit(self) -> None:
        """Train from ``self.step`` to the end.

        Raises:
            TrainingError: a loss or gradient is not finite; the batch's origins are saved in the log folder.
            Preempted: a signal has asked for it.
        """
        try:
            for hook in self.hooks:
                hook.on_start(self)
            if self.settings.val_before_training and self.step == 0:
                self.validate()
            ended_before = self.step >= self.settings.total_steps > 0
            while self.step < self.settings.total_steps:
                self._stop_if_asked()
                self._fit_step()
            if self.evaluation_put_off:  # the last step's
                self._stop_if_asked()
            if self.settings.val_after_training and not ended_before:
                self.validate()
            for hook in self.hooks:
                hook.on_end(self)
        finally:
            for hook in self.hooks:
                hook.close()

    def _stop_if_asked(self) -> None:
        signal = self.interruption.agreed(self.device)
        if signal is not None:
            for hook in self.hooks:
                hook.on_preempted(self)
            raise Preempted(
                f"stopped by {signal.name} after step {self.step} of {self.settings.total_steps}; the same command "
                "goes on from the newest checkpoint with exp_manager.resume_if_exists=true"
            )

    def _fit_step(self) -> None:
        metrics = self.train_step()
        self.step += 1
        metrics["epoch"] = self.epoch
        for hook in self.hooks:
            hook.on_step(self, metrics)
        interval = self.settings.val_check_interval
        if interval and self.step % interval == 0:
            self.validate()

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns the world's metrics, the same on every rank."""
        start, clock = time.perf_counter(), PhaseClock()
        with clock.phase("data"):
            batches = [batch.to(self.device) for batch in self.source.step(self.step)]
        metrics = dict(self.source.metrics)
        for learner in self.learners:
            metrics |= self._learn(learner, batches, clock)
        seconds = time.perf_counter() - start
        metrics |= clock.seconds
        metrics |= {"step_seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
        return metrics | {"peak_memory_gib": peak_memory_gib()}

    def _learn(self, learner: Learner, batches: list[Batch], clock: PhaseClock) -> dict[str, float]:
        """One step of one model; its metrics under names that begin with the learner's prefix."""
        model, objective, prefix = learner.model, learner.objective, learner.prefix
        totals = Totals()
        with clock.phase(f"{prefix}frozen"):
            annotations = objective.annotate(batches)
        with clock.phase(f"{prefix}forward_backward"):
            for chunk in model.wrapped:
                chunk.train()
            model.zero_grad()
            losses = objective.gradients(model.wrapped, batches, annotations)
            clock.seconds[f"{prefix}gradient_sync_seconds"] = model.gradient_sync.seconds
            totals.add(losses, batches)
            metrics = self._world.reduce(f"{prefix}train", totals)
        if not math.isfinite(metrics["loss"]):
            self._stop_on_nonfinite(f"{prefix}loss", metrics["loss"], batches, losses)
        with clock.phase(f"{prefix}optimizer"):
            # The schedule's first step is number 1: warm-up must not spend a step at learning rate 0.
            model.scheduler.step(1)
            metrics["lr"] = model.optimizer.param_groups[0]["lr"]
            _, grad_norm, _ = model.optimizer.step()
        if grad_norm is not None:
            metrics["grad_norm"] = float(grad_norm)
            if not math.isfinite(grad_norm):
                self._stop_on_nonfinite(f"{prefix}grad_norm", float(grad_norm), batches, losses)
        return {f"{prefix}{name}": value for name, value in metrics.items()}

    def validate(self) -> dict[str, float]:
        """Metrics over the validation set, without gradients; empty where there is none or it was just done."""
        if not self.source.has_validation or self._validated_at == self.step:
            return {}
        start, totals, policy = time.perf_counter(), Totals(), self.learners[0]
        for cpu_batches in self.source.validation(self.step):
            for chunk in policy.model.wrapped:
                chunk.eval()
            batches = [batch.to(self.device) for batch in cpu_batches]
            if batches:
                totals.add(policy.objective.evaluate(batches), batches)
        metrics = self._world.reduce("validation", totals) | dict(self.source.metrics)
        metrics["validation_seconds"] = time.perf_counter() - start
        self._validated_at = self.step
        for hook in self.hooks:
            hook.on_validation(self, metrics)
        return metrics

    def _stop_on_nonfinite(self, what: str, value: float, batches: list[Batch], losses: list[LossOutput]) -> None:
        folder = self.settings.log_dir / "nonfinite"
        if groups.is_metrics_rank():
            folder.mkdir(parents=True, exist_ok=True)
            report = [
                {"loss": float(loss.total), "count": loss.count, "origins": batch.origins}
                for loss, batch in zip(losses, batches, strict=True)
            ]
            path = folder / f"step_{self.step + 1}_data_rank_{groups.data().rank}.json"
            path.write_text(json.dumps({what: repr(value), "micro_batches": report}, indent=1))
        raise TrainingError(
            f"{what} is {value} at step {self.step + 1}: training stops before the weights are saved; the batch's rows "
            f"are listed in {folder}; lower model.optim.lr, or resume from the last checkpoint without those rows"
        )
