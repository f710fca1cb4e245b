"""What an algorithm is: a value that the training loop reads. The loop knows none of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from megatron_aligndistil.config.base_schema import OptimConfig
from megatron_aligndistil.data.records import Kind
from megatron_aligndistil.rollout.reward_function import RewardFunction
from megatron_aligndistil.types import Batch, Example, LossOutput, VocabHead

# From a model's projection (models.heads) of a micro-batch: hidden states [T, H], or numbers a response token [T] or a
# sequence [N].
Keep = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Role:
    """A frozen model that an algorithm needs, with a head of one output where ``scalar``.

    ``keep`` is what survives its forward pass of a micro-batch.
    """

    path: str
    config_key: str
    keep: Keep
    scalar: bool = False


@dataclass(frozen=True)
class RoleOutput:
    """What a role kept of one micro-batch, and its head."""

    kept: Tensor
    head: VocabHead


@dataclass(frozen=True)
class Critic:
    """A second model under training, with a head of one output."""

    path: str
    config_key: str
    optim: OptimConfig
    loss: Callable[[Any, Batch, Any], LossOutput]


@dataclass(frozen=True)
class Trajectory:
    """A response, sampled or given, and what the forward-only passes said of it.

    statistics  name → numbers a response token [T], or one of the sequence [1]
    """

    example: Example
    statistics: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Assembled:
    """What a rollout comes to.

    values   a trajectory's numbers a response token, name → [T], for ``Example.values``
    metrics  of the rollout
    state    what the next rollout's assembly takes
    """

    values: Sequence[Mapping[str, np.ndarray]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Forward-only passes over whole examples, before a step trains.

    policy  statistic → what is kept of the policy's pass; ``critic`` likewise
    roles   statistic → frozen model
    """

    policy: Mapping[str, Keep] = field(default_factory=dict)
    critic: Mapping[str, Keep] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)


@dataclass(frozen=True)
class Experience(Passes):
    """What is computed of a rollout once, before it trains.

    assemble  from every trajectory of the rollout, the same on each rank, and the state that the last rollout left
    function  a reward of the texts, as the statistic "score"
    state     what the first assembly takes
    """

    assemble: Callable[[Sequence[Trajectory], Mapping[str, float]], Assembled]
    function: RewardFunction | None = None
    state: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate(Passes):
    """What is computed of every global batch of a data set, with the weights of its step, before it is trained on.

    examples   of the global batch, what the passes run on; their origins are unique
    constants  from all their trajectories, the same on each rank: numbers of the step, for ``Batch.constants``
    """

    examples: Callable[[Sequence[Example]], list[Example]]
    constants: Callable[[Sequence[Trajectory]], Mapping[str, float]]


Annotate = Callable[[Batch, Mapping[str, RoleOutput]], Any]


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    kind        what an example is: a pair of responses, a single one (with a label, or without), or a prompt that a
                rollout answers
    loss        from the policy's projection, the micro-batch and its annotation
    transform   applied to every example as it is read
    roles       name → frozen model that every step runs
    annotate    turns the roles' outputs of a micro-batch into what the loss takes, once, before the policy's pass
    experience  of a rollout; None where the examples are a data set's
    estimate    of a data set's global batch; None where a loss needs no more than its micro-batch
    critic      trained beside the policy on the same micro-batches
    scalar      the policy has a head of one output: a reward model
    """

    name: str
    kind: Kind
    loss: Callable[[Any, Batch, Any], LossOutput]
    transform: Callable[[Example], Example] | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)
    annotate: Annotate = lambda batch, outputs: None
    experience: Experience | None = None
    estimate: Estimate | None = None
    critic: Critic | None = None
    scalar: bool = False

    @property
    def every_role(self) -> dict[str, Role]:
        """The frozen models of its steps, its rollouts and its estimate."""
        before = [passes.roles for passes in (self.experience, self.estimate) if passes is not None]
        return {name: role for roles in (self.roles, *before) for name, role in roles.items()}
