"""What a check of an algorithm is: its settings, the words a response token that it must send, and its dense loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.certificate import dense_model as dense
from megatron_aligndistil.certificate.adapters import AdaptedWorld
from megatron_aligndistil.certificate.models import World
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.config.schema import SCHEMAS, RunConfig
from megatron_aligndistil.types import Example


def singles(world: World) -> list[Example]:
    """One response each."""
    return world.singles


def pairs(world: World) -> list[Example]:
    """A chosen and a rejected response each."""
    return world.pairs


class DenseLoss(NamedTuple):
    """A loss, the mean of its terms.

    size  the mean of their absolute values, which is the loss itself where no term is negative. A policy gradient's
          terms have either sign, and their mean can be near 0 by chance: it is no measure of what rounding does to it
    """

    value: float
    size: float


class Reference(NamedTuple):
    """The dense loss and its gradient by Hugging Face name."""

    loss: DenseLoss
    gradients: dense.Weights


@dataclass(frozen=True)
class AlgorithmCheck:
    """One algorithm under one setting, and one of the models that it trains.

    algorithm      its name in ``algorithms.table``
    words          elements a response token that loss, annotation and frozen roles of a step must send together; the
                   passes over a rollout are not counted
    loss           the terms of the dense loss of (trained model's weights, world)
    examples       of a world, what a step trains on; a rollout's are given their values in the layout
    settings       keys below ``model``; paths name models of the world
    words_a_batch  elements a micro-batch that they must send beside those
    trained        the world's model whose gradient is compared: "critic" stands for the algorithm's second model
    lora           the world's models are adapters, of which the policy and its teachers share one base
    """

    algorithm: str
    words: int
    loss: Callable[[dense.Weights, World], Tensor]
    examples: Callable[[World], list[Example]] = singles
    settings: Mapping[str, Any] = field(default_factory=dict)
    words_a_batch: int = 0
    trained: str = "policy"
    lora: bool = False

    def config(self, kernel: KernelConfig) -> RunConfig:
        """The run configuration, as the command line would build it."""
        config = SCHEMAS[self.algorithm]()
        config.algorithm = self.algorithm
        config.model.restore_from_path = "policy"
        config.model.kernel = kernel
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            if not hasattr(getattr(config.model, section), name):
                raise KeyError(f"model.{key} is no key of {self.algorithm}")
            setattr(getattr(config.model, section), name, value)
        return config

    def step_of(self, algorithm: Algorithm) -> Algorithm:
        """What a step of the trained model minimises."""
        if self.trained != "critic":
            return algorithm
        assert algorithm.critic is not None
        return Algorithm(f"{algorithm.name} critic", algorithm.kind, algorithm.critic.loss, scalar=True)

    def reference(self, world: World) -> Reference:
        """What a step must come to."""
        if self.lora:
            world = AdaptedWorld(world.architecture, world.examples)
        weights = {name: weight.clone().requires_grad_() for name, weight in world.trained(self.trained).items()}
        terms = self.loss(world.assembled(self.trained, weights), world)
        gradients = dense.gradients(terms.mean(), weights)
        terms = terms.detach()
        return Reference(DenseLoss(float(terms.mean()), float(terms.abs().mean())), gradients)


def responses_of(examples: list[Example]) -> list[tuple[dense.Response, ...]]:
    """The examples in the reference's terms."""
    return [tuple(dense.Response(s.tokens, s.prompt_length) for s in example.sequences) for example in examples]
