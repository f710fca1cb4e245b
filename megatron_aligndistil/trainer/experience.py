"""The forward-only passes over a rollout or a global batch, and what an algorithm makes of them.

Shapes: T response tokens, N sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Estimate, Keep, Passes, Trajectory
from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.heads import project
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import collectives, groups, schedule
from megatron_aligndistil.types import Batch, Example

Statistics = dict[str, np.ndarray]


@dataclass(frozen=True)
class ExperiencePasses:
    """The models that say something of examples. ``critic`` is empty where there is none."""

    policy: Sequence[HiddenStateModel]
    critic: Sequence[HiddenStateModel]
    frozen: Mapping[str, FrozenModel]
    batching: MicroBatching

    def statistics(self, examples: Sequence[Example], asked: Passes) -> list[Statistics]:
        """Of each example, in order, on every rank; the examples' origins are unique."""
        axis = groups.data()
        device = next(self.policy[0].parameters()).device
        batches = [b.to(device) for b in micro_batches(list(examples), axis.rank, axis.size, self.batching)]
        found: dict[str, Statistics] = {}
        if batches:
            for name, keep in asked.policy.items():
                _collect(found, name, batches, _forward(self.policy, batches, keep))
            for name, keep in asked.critic.items():
                _collect(found, name, batches, _forward(self.critic, batches, keep))
            for name, role in asked.roles.items():
                _collect(found, name, batches, self.frozen[name].run(batches, role.keep))
        # Losses and pipelines end on the last stage; whatever an algorithm makes of a rollout, every rank must know.
        known = collectives.gather_objects(found if groups.is_metrics_rank() else {})
        merged = {origin: values for part in known for origin, values in part.items()}
        return [merged.get(example.origin, {}) for example in examples]


@dataclass(frozen=True)
class Estimator:
    """What an algorithm computes of a global batch, and the models that it takes."""

    estimate: Estimate
    passes: ExperiencePasses

    def constants(self, examples: Sequence[Example]) -> Mapping[str, float]:
        """Of a global batch, under the policy's present weights. Every rank calls it and gets the same."""
        asked = self.estimate.examples(examples)
        statistics = self.passes.statistics(asked, self.estimate)
        return self.estimate.constants([Trajectory(e, own) for e, own in zip(asked, statistics, strict=True)])


@torch.no_grad()
def _forward(chunks: Sequence[HiddenStateModel], batches: Sequence[Batch], keep: Keep) -> list[Tensor]:
    for chunk in chunks:
        chunk.eval()
    return schedule.forward_only(
        chunks, batches, lambda hidden, index: keep(project(chunks[-1], hidden, batches[index]), batches[index])
    )


def _collect(found: dict[str, Statistics], name: str, batches: Sequence[Batch], kept: Sequence[Tensor]) -> None:
    """Add what was kept of the micro-batches to their examples' statistics; ``kept`` is empty before the last stage."""
    for batch, values in zip(batches, kept, strict=False):
        lengths = batch.response_lengths.tolist()
        per_token = values.numel() == sum(lengths)
        parts = values.detach().cpu().split(lengths if per_token else [1] * len(lengths))
        for origin, part in zip(batch.origins, parts, strict=True):
            found.setdefault(origin, {})[name] = part.numpy()


def with_values(trajectories: Sequence[Trajectory], values: Sequence[Mapping[str, np.ndarray]]) -> list[Example]:
    """The trajectories' examples with their values in the type of the statistics, which is float32 but in fp64 runs."""
    kinds = {array.dtype for trajectory in trajectories for array in trajectory.statistics.values()}
    dtype = np.float64 if kinds == {np.dtype(np.float64)} else np.float32
    return [
        replace(trajectory.example, values={name: np.asarray(array, dtype) for name, array in own.items()})
        for trajectory, own in zip(trajectories, values, strict=True)
    ]
