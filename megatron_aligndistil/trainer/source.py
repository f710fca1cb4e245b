"""Micro-batches from a data set: the off-policy source."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.data.examples import ExampleSet
from megatron_aligndistil.data.sampler import BatchSampler, validation_batches
from megatron_aligndistil.parallel.groups import Axis
from megatron_aligndistil.types import Batch


class DatasetSource:
    """This data-parallel rank's share of every global batch."""

    def __init__(
        self,
        train: ExampleSet,
        validation: ExampleSet | None,
        sampler: BatchSampler,
        batching: MicroBatching,
        data_axis: Axis,
        limit_validation: int,
    ) -> None:
        self.train, self.validation_set, self.sampler = train, validation, sampler
        self.batching, self.axis, self.limit_validation = batching, data_axis, limit_validation
        self.steps_per_epoch = sampler.steps_per_epoch
        self.has_validation = validation is not None and limit_validation != 0

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step ``step``, from 0."""
        return self._share(self.train[self.sampler.batch(step)])

    def validation(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the validation set, a global batch at a time."""
        if self.validation_set is None:
            return
        for number, examples in enumerate(validation_batches(self.validation_set, self.sampler.global_batch_size)):
            if number == self.limit_validation:
                return
            yield self._share(examples)

    def _share(self, examples: list) -> list[Batch]:
        return micro_batches(examples, self.axis.rank, self.axis.size, self.batching)
