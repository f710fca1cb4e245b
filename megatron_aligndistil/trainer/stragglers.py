"""Which rank is the slowest, by phase: the time that each spends on its own work, without waiting for the others."""

from __future__ import annotations

import json
import logging
import socket
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_aligndistil.parallel import collectives
from megatron_aligndistil.trainer.hooks import Hook, Metrics

if TYPE_CHECKING:
    from megatron_aligndistil.trainer.loop import Trainer

logger = logging.getLogger(__name__)

STRAGGLERS_FILE = "stragglers.jsonl"
_SUFFIX = "_seconds"
_NOT_PHASES = ("step_seconds", "validation_seconds")
SYNC = "gradient_sync"  # begins when a rank has its gradients: the wait for those who have not
# A phase is worth a warning where its slowest rank takes so much longer than the median one, and so much of a step.
_RATIO, _SHARE_OF_STEP = 1.25, 0.02


class StragglerReport(Hook):
    """Compares the ranks every ``every_n_steps`` steps; rank 0 writes ``stragglers.jsonl`` and warns."""

    def __init__(self, log_dir: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = log_dir / STRAGGLERS_FILE, every_n_steps
        self._seconds: dict[str, float] = {}
        self._steps = 0

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        self._steps += 1
        for name, seconds in own_work(metrics).items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if trainer.step % self.every_n_steps == 0:
            means = {name: seconds / self._steps for name, seconds in self._seconds.items()}
            gathered = collectives.gather_objects((socket.gethostname(), means, metrics["step_seconds"]))
            if dist.get_rank() == 0:
                self._report(trainer.step, gathered)
            self._seconds, self._steps = {}, 0

    def _report(self, step: int, gathered: Sequence[tuple[str, Mapping[str, float], float]]) -> None:
        hosts, ranks = [host for host, _, _ in gathered], [means for _, means, _ in gathered]
        phases = {name: slowest(name, ranks) for name in ranks[0]}
        with self.path.open("a", encoding="utf-8") as file:
            named = {
                name: {"rank": rank, "host": hosts[rank], "seconds": most, "median_seconds": median}
                for name, (rank, most, median) in phases.items()
            }
            file.write(json.dumps({"step": step, "steps": self._steps, "slowest": named}) + "\n")
        for name, (rank, most, median) in phases.items():
            if most > _RATIO * median and most - median > _SHARE_OF_STEP * gathered[0][2]:
                logger.warning(
                    "straggler: %s takes rank %d (%s) %.3f s a step, the median rank %.3f s (%d steps up to step %d)",
                    *(name, rank, hosts[rank], most, median, self._steps, step),
                )


def own_work(metrics: Metrics) -> dict[str, float]:
    """Seconds by phase; what a rank waits in the gradients' exchange is not its own."""
    seconds = {
        name.removesuffix(_SUFFIX): value
        for name, value in metrics.items()
        if name.endswith(_SUFFIX) and name not in _NOT_PHASES
    }
    for name in [name for name in seconds if name.endswith(SYNC)]:
        phase = f"{name.removesuffix(SYNC)}forward_backward"
        seconds[phase] -= seconds.pop(name)
    return seconds


def slowest(phase: str, ranks: Sequence[Mapping[str, float]]) -> tuple[int, float, float]:
    """The slowest rank of a phase, its seconds, and the median rank's."""
    seconds = [means.get(phase, 0.0) for means in ranks]
    most = max(seconds)
    return seconds.index(most), most, statistics.median(seconds)
