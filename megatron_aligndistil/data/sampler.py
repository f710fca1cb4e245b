"""Which examples a step trains on: a pure function of the seed and the step, so a resumed run needs no saved state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_aligndistil.data.examples import ExampleSet
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.types import Example


@dataclass(frozen=True)
class BatchSampler:
    """Global batches over epochs, each epoch in its own order; examples that don't fill a batch wait for another epoch.

    It doesn't know the parallel layout: every layout trains on the same examples in the same step.
    """

    n_examples: int
    global_batch_size: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.n_examples < self.global_batch_size:
            raise ConfigError(
                f"model.global_batch_size={self.global_batch_size} is more than the {self.n_examples} examples of the "
                "training data; lower it or give more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.n_examples // self.global_batch_size

    @property
    def left_over(self) -> int:
        """Examples that an epoch doesn't reach."""
        return self.n_examples % self.global_batch_size

    def batch(self, step: int) -> np.ndarray:
        """Indices [global_batch_size] of the examples of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.n_examples, self.seed, epoch) if self.shuffle else np.arange(self.n_examples)
        start = position * self.global_batch_size
        return order[start : start + self.global_batch_size]

    def line(self) -> str:
        """For the log: steps an epoch, and what an epoch leaves out."""
        text = f"{self.steps_per_epoch:,} steps of {self.global_batch_size} examples an epoch"
        return f"{text}; {self.left_over} examples are left over in each" if self.left_over else text


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, [n], not to be written to.

    Philox's raw stream is fixed for all versions of NumPy, ``permutation`` isn't.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
    order.flags.writeable = False
    return order


def validation_batches(examples: ExampleSet, global_batch_size: int) -> Iterator[list[Example]]:
    """Every example once, in file order; the last batch holds what is left."""
    for start in range(0, len(examples), global_batch_size):
        yield examples[range(start, min(start + global_batch_size, len(examples)))]
