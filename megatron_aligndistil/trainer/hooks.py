"""What happens around steps: reporting, checkpoints, evaluation. The loop calls hooks; hooks never call the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_aligndistil.trainer.loop import Trainer

Metrics = Mapping[str, float]


class Hook:
    """Called on every rank, in the order of the hooks."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step; ``trainer.step`` steps are done already."""

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        """After step number ``trainer.step``."""

    def on_validation(self, trainer: Trainer, metrics: Metrics) -> None:
        """After a validation pass."""

    def on_pause(self, trainer: Trainer) -> None:
        """Before something long, such as an evaluation: what goes on in the background comes to its end."""

    def on_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        """After an evaluation, which is itself a hook's."""

    def on_preempted(self, trainer: Trainer) -> None:
        """A signal ends the run here, after step number ``trainer.step``."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step. Not called after an error."""

    def close(self) -> None:
        """Always called last, error or not."""
