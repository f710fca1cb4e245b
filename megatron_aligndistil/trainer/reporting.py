"""Hooks that report: a progress bar, ``metrics.jsonl``, TensorBoard, Weights & Biases. All act on rank 0 only."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.config.json_text import parse_json
from megatron_aligndistil.trainer.hooks import Hook, Metrics

if TYPE_CHECKING:
    from megatron_aligndistil.trainer.loop import Trainer

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# What the bar shows beside rate and time left, where the algorithm has it.
_BAR_METRICS = (
    "loss",
    "reward",
    "reward_accuracy",
    "expected_reward",
    "token_reward",
    "grad_norm",
    "tokens_per_second",
)
# Seconds between two prints of the bar where nobody watches a terminal.
_QUIET_INTERVAL = 15.0
_LINES_SHOWN = 5


class ProgressBar(Hook):
    """Steps, rate, time left and the main metrics."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bar: tqdm | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._bar = tqdm(
            total=trainer.settings.total_steps,
            initial=trainer.step,
            desc=self.name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else _QUIET_INTERVAL,
            dynamic_ncols=True,
        )

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if self._bar is not None:
            self._bar.set_postfix({k: f"{metrics[k]:.4g}" for k in _BAR_METRICS if k in metrics}, refresh=False)
            self._bar.update()

    def on_validation(self, trainer: Trainer, metrics: Metrics) -> None:
        self._say("validation", trainer, metrics)

    def on_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        self._say("evaluation", trainer, metrics)

    def _say(self, phase: str, trainer: Trainer, metrics: Metrics) -> None:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in sorted(metrics.items()) if not k.endswith("tokens"))
        logger.info("%s at step %d: %s", phase, trainer.step, figures)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class MetricsFile(Hook):
    """One JSON object a line in ``metrics.jsonl``; a resumed run takes the place of the steps that it repeats."""

    def __init__(self, log_dir: Path, every_n_steps: int) -> None:
        self.path = log_dir / METRICS_FILE
        self.every_n_steps = every_n_steps
        self._file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        write_text(self.path, "".join(kept_lines(self.path, trainer.step)))
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if trainer.step % self.every_n_steps == 0:
            self._write({"step": trainer.step, "phase": "train", **metrics})

    def on_validation(self, trainer: Trainer, metrics: Metrics) -> None:
        self._write({"step": trainer.step, "phase": "validation", **metrics})

    def on_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        self._write({"step": trainer.step, "phase": "evaluation", **metrics})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")


def kept_lines(path: Path, steps: int) -> list[str]:
    """The lines of the first ``steps`` steps in a ``metrics.jsonl``, if there is one.

    A line that isn't a record is left out: a killed run may leave half of one, and a run goes on without it.
    """
    if not steps or not path.is_file():
        return []
    kept, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8")
            step = parse_json(text)["step"]
            if step <= steps:
                kept.append(text + "\n")
        except (ValueError, LookupError, TypeError):
            damaged += [number] if line else []
    if damaged:
        logger.warning("%s: left out, since no records: line %s", path, ", ".join(map(str, damaged[:_LINES_SHOWN])))
    return kept


class TensorBoard(Hook):
    """Scalars under ``train/``, ``validation/`` and ``evaluation/``."""

    def __init__(self, log_dir: Path, every_n_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.every_n_steps = every_n_steps
        self._writer = SummaryWriter(log_dir / "tensorboard")

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if trainer.step % self.every_n_steps == 0:
            self._write("train", trainer.step, metrics)

    def on_validation(self, trainer: Trainer, metrics: Metrics) -> None:
        self._write("validation", trainer.step, metrics)

    def on_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        self._write("evaluation", trainer.step, metrics)

    def close(self) -> None:
        self._writer.close()

    def _write(self, phase: str, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{phase}/{name}", value, step)


class WeightsAndBiases(Hook):
    """The same to Weights & Biases; ``settings`` are passed to ``wandb.init``."""

    def __init__(self, log_dir: Path, name: str, settings: Mapping[str, Any], every_n_steps: int) -> None:
        import wandb

        self.every_n_steps = every_n_steps
        given = {key: value for key, value in settings.items() if value is not None}
        self._run = wandb.init(dir=str(log_dir), **{"name": name, **given})

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if trainer.step % self.every_n_steps == 0:
            self._log("train", trainer.step, metrics)

    def on_validation(self, trainer: Trainer, metrics: Metrics) -> None:
        self._log("validation", trainer.step, metrics)

    def on_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        self._log("evaluation", trainer.step, metrics)

    def _log(self, phase: str, step: int, metrics: Metrics) -> None:
        self._run.log({f"{phase}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
