"""Forward-only passes of sharded models over a data set, a window of examples at a time.

Every rank calls the same functions with the same arguments and gets the same results. Shapes: T response tokens,
N sequences of a micro-batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Keep, RoleOutput
from megatron_aligndistil.algorithms.statistics import response_logprobs
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.parallel import collectives, groups
from megatron_aligndistil.types import Batch, Example

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0
Values = dict[str, np.ndarray]
# From a micro-batch and what each model said of it to numbers a response token [T], or a sequence [N].
Compute = Callable[[Batch, Mapping[str, RoleOutput]], Mapping[str, Tensor]]


class Examples(Protocol):
    """What a window is read from: an ``ExampleSet``, or a list behind ``Listed``."""

    def __len__(self) -> int: ...
    def read(self, indices: Sequence[int]) -> list[Example]:
        """Examples of one sequence each."""
        ...


@dataclass(frozen=True)
class Listed:
    """Examples in memory."""

    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Those at ``indices``."""
        return [self.examples[i] for i in indices]


@dataclass(frozen=True)
class Passes:
    """How examples go through the models: micro-batches of ``batching``, ``window`` examples a replica at a time."""

    batching: MicroBatching
    window: int

    def run(self, models: Mapping[str, FrozenModel], keep: Keep, compute: Compute, examples: Examples) -> list[Values]:
        """Of each example, in order: what ``compute`` makes of its micro-batch, [T] or, of numbers a sequence, [1].

        Each model keeps ``keep``'s tensors of a window's micro-batches until all have run; ``compute`` runs on the
        last pipeline stage, on all of its tensor-parallel ranks.
        """
        found: dict[int, Values] = {}
        for indices in self._windows(len(examples)):
            read = zip(indices, examples.read(indices), strict=True)
            numbered = [replace(example, origin=str(index)) for index, example in read]
            for batch, values in self._window(models, keep, compute, numbered):
                for index, own in zip(batch.origins, _split(values, batch), strict=True):
                    found[int(index)] = own
        known = collectives.gather_objects(found if groups.is_metrics_rank() else {})
        merged = {index: values for part in known for index, values in part.items()}
        return [merged[index] for index in range(len(examples))]

    def _window(
        self, models: Mapping[str, FrozenModel], keep: Keep, compute: Compute, examples: Sequence[Example]
    ) -> Iterator[tuple[Batch, Mapping[str, Tensor]]]:
        axis = groups.data()
        device = next(iter(models.values())).device
        batches = [b.to(device) for b in micro_batches(examples, axis.rank, axis.size, self.batching)]
        if not batches:
            return
        kept = {name: model.run(batches, keep) for name, model in models.items()}
        if not groups.is_last_stage():
            return
        for i, batch in enumerate(batches):
            outputs = {name: RoleOutput(kept[name][i], model.head) for name, model in models.items()}  # type: ignore[arg-type]
            yield batch, compute(batch, outputs)

    def _windows(self, count: int) -> Iterator[range]:
        step = self.window * groups.data().size
        said = time.perf_counter()
        for start in range(0, count, step):
            yield range(start, min(start + step, count))
            if time.perf_counter() - said > LOG_SECONDS:
                said = time.perf_counter()
                logger.info("%d of %d sequences", min(start + step, count), count)


def summed_logprobs(kernel: KernelConfig) -> Keep:
    """log π of whole responses, nats, summed in float64: [N]."""
    logprobs = response_logprobs(kernel)

    def keep(projection: Projection, batch: Batch) -> Tensor:
        return batch.sum_by_sequence(logprobs(projection, batch).double())

    return keep


def kept_of(name: str) -> Compute:
    """What the model ``name`` kept, as it is."""
    return lambda batch, outputs: {name: outputs[name].kept}


def _split(values: Mapping[str, Tensor], batch: Batch) -> list[Values]:
    """Each example's part; a micro-batch's examples have one sequence each."""
    lengths = batch.response_lengths.tolist()
    parts: list[Values] = [{} for _ in lengths]
    for name, tensor in values.items():
        sizes = lengths if tensor.numel() == sum(lengths) else [1] * len(lengths)
        for own, part in zip(parts, tensor.detach().cpu().split(sizes), strict=True):
            own[name] = part.numpy()
    return parts
