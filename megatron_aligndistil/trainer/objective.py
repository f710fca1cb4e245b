"""An algorithm applied to a policy: frozen passes, then the policy's, over the micro-batches of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_aligndistil.algorithms.algorithm import Algorithm, RoleOutput
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.heads import project
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import groups, schedule
from megatron_aligndistil.trainer.optimizer import TrainedModel
from megatron_aligndistil.types import Batch, LossOutput

POLICY, CRITIC = "policy", "critic"


@dataclass(frozen=True)
class Learner:
    """A model under training, and what is minimised for it. The policy's metrics have no prefix."""

    name: str
    model: TrainedModel
    objective: Objective

    @property
    def prefix(self) -> str:
        """What the names of its metrics begin with."""
        return "" if self.name == POLICY else f"{self.name}_"


class Objective:
    """What is minimised, and for which weights: ``chunks`` are the policy's bare model chunks."""

    def __init__(
        self, algorithm: Algorithm, chunks: Sequence[HiddenStateModel], frozen: Mapping[str, FrozenModel]
    ) -> None:
        self.algorithm = algorithm
        self.chunks = list(chunks)
        self.frozen = frozen

    @torch.no_grad()
    def annotate(self, batches: Sequence[Batch]) -> list[Any]:
        """What the loss takes beside each micro-batch; empty on all but the last pipeline stage."""
        kept = {name: self.frozen[name].run(batches, role.keep) for name, role in self.algorithm.roles.items()}
        if not groups.is_last_stage():
            return []
        annotations = []
        for index, batch in enumerate(batches):
            outputs = {name: RoleOutput(values[index], self._head(name)) for name, values in kept.items()}
            annotations.append(self.algorithm.annotate(batch, outputs))
        return annotations

    def gradients(
        self, wrapped: Sequence[nn.Module], batches: Sequence[Batch], annotations: Sequence[Any]
    ) -> list[LossOutput]:
        """Run forward and backward through ``wrapped`` (the chunks in DDP), leaving the gradient of the world's mean.

        Returns the micro-batches' losses, on the last stage.
        """
        return schedule.forward_backward(
            wrapped, batches, lambda hidden, index: self._loss(hidden, batches[index], annotations[index])
        )

    def evaluate(self, batches: Sequence[Batch]) -> list[LossOutput]:
        """The micro-batches' losses without gradients, on the last stage."""
        annotations = self.annotate(batches)
        return schedule.forward_only(
            self.chunks, batches, lambda hidden, index: self._loss(hidden, batches[index], annotations[index])
        )

    def _loss(self, hidden_SBH: Tensor, batch: Batch, annotation: Any) -> LossOutput:
        return self.algorithm.loss(project(self.chunks[-1], hidden_SBH, batch), batch, annotation)

    def _head(self, role: str) -> Any:
        return self.frozen[role].head
