"""What the trainer computes of a rollout or a global batch before a step, made in the user's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_aligndistil.algorithms.algorithm import Estimate, Experience, Trajectory
from megatron_aligndistil.data.collate import MicroBatching
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.trainer.experience import Estimator, ExperiencePasses, with_values
from megatron_aligndistil.types import Example


def with_experience(
    examples: Sequence[Example], experience: Experience, model: Callable[[str], FrozenModel], how: MicroBatching
) -> list[Example]:
    """The examples with their values, as a rollout's first step gets them. Every rank calls it.

    The policy and the critic of the passes are the world's "old" and "old critic": in training the weights have moved
    on since, and only then do ratios differ from 1 and clipping binds.
    """
    critic = model("old critic").chunks if experience.critic else []
    frozen = {name: model(role.path) for name, role in experience.roles.items()}
    passes = ExperiencePasses(model("old").chunks, critic, frozen, how)
    statistics = passes.statistics(examples, experience)
    trajectories = [Trajectory(example, own) for example, own in zip(examples, statistics, strict=True)]
    return with_values(trajectories, experience.assemble(trajectories, experience.state).values)


def constants_of(
    examples: Sequence[Example],
    estimate: Estimate | None,
    trained: Sequence[HiddenStateModel],
    model: Callable[[str], FrozenModel],
    how: MicroBatching,
) -> Mapping[str, float]:
    """What the step's micro-batches of a global batch have in common. Every rank calls it."""
    if estimate is None:
        return {}
    frozen = {name: model(role.path) for name, role in estimate.roles.items()}
    return Estimator(estimate, ExperiencePasses(trained, [], frozen, how)).constants(examples)
