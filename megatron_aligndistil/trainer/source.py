"""Where micro-batches come from: the protocol, and the source that reads a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.data.examples import ExampleSet
from megatron_aligndistil.data.sampler import BatchSampler, validation_batches
from megatron_aligndistil.parallel.groups import Axis
from megatron_aligndistil.trainer.experience import Estimator
from megatron_aligndistil.trainer.metrics import PhaseClock
from megatron_aligndistil.types import Batch, Example


@dataclass(frozen=True)
class SourceState:
    """What a source keeps in a checkpoint."""

    arrays: Mapping[str, np.ndarray]
    text: str


class BatchSource(Protocol):
    """Where micro-batches come from. ``metrics`` are the last step's or validation's own, alike on every rank."""

    steps_per_epoch: int
    has_validation: bool
    metrics: Mapping[str, float]

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step ``step``, from 0; every rank calls it, in the steps' order."""

    def validation(self, step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the validation set, a global batch at a time; may be empty lists."""

    def state(self, step: int) -> SourceState | None:
        """What step ``step`` and those after it need beside their number; None where that is all."""

    def restore(self, state: SourceState) -> None:
        """Go on from what ``state`` returned."""

    def close(self) -> None:
        """End what the source has started."""


class DatasetSource:
    """This data-parallel rank's share of every global batch, with what ``estimator`` says of the whole of it."""

    def __init__(
        self,
        train: ExampleSet,
        validation: ExampleSet | None,
        sampler: BatchSampler,
        batching: MicroBatching,
        data_axis: Axis,
        limit_validation: int,
        estimator: Estimator | None = None,
    ) -> None:
        self.train, self.validation_set, self.sampler = train, validation, sampler
        self.batching, self.axis, self.limit_validation = batching, data_axis, limit_validation
        self.estimator = estimator
        self.steps_per_epoch = sampler.steps_per_epoch
        self.has_validation = validation is not None and limit_validation != 0
        self.metrics: Mapping[str, float] = {}

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step ``step``, from 0."""
        clock = PhaseClock()
        share = self._share(self.train[self.sampler.batch(step)], clock)
        self.metrics = clock.seconds
        return share

    def validation(self, step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the validation set, a global batch at a time."""
        self.metrics = {}
        if self.validation_set is None:
            return
        for number, examples in enumerate(validation_batches(self.validation_set, self.sampler.global_batch_size)):
            if number == self.limit_validation:
                return
            yield self._share(examples, PhaseClock())

    def state(self, step: int) -> None:
        """Nothing: a step is a pure function of its number."""

    def restore(self, state: SourceState) -> None:
        """Never called."""
        raise AssertionError("a data set's source has no state")

    def close(self) -> None:
        """Nothing to end."""

    def _share(self, examples: list[Example], clock: PhaseClock) -> list[Batch]:
        batches = micro_batches(examples, self.axis.rank, self.axis.size, self.batching)
        if self.estimator is None:
            return batches
        with clock.phase("estimate"):
            constants = self.estimator.constants(examples)
        return [replace(batch, constants=constants) for batch in batches]
