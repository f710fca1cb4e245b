"""The algorithms' checks: for each its settings, the words a response token that it must send, and its dense loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_aligndistil.certificate import dense_model as dense
from megatron_aligndistil.certificate.models import World
from megatron_aligndistil.config.compose import SCHEMAS
from megatron_aligndistil.config.schema import KernelConfig, RunConfig
from megatron_aligndistil.types import Example


@dataclass(frozen=True)
class AlgorithmCheck:
    """One algorithm under one setting.

    algorithm      its name in ``algorithms.table``
    words          elements a response token that loss, annotation and frozen roles must send together
    loss           the dense loss of (policy's weights, world)
    pairs          whether its examples are pairs
    settings       keys below ``model``; paths name models of the world
    words_a_batch  elements a micro-batch that they must send beside those
    """

    algorithm: str
    words: int
    loss: Callable[[dense.Weights, World], Tensor]
    pairs: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    words_a_batch: int = 0

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

    def examples(self, world: World) -> list[Example]:
        """What it trains on."""
        return world.pairs if self.pairs else world.singles

    def reference(self, world: World) -> tuple[float, dense.Weights]:
        """Dense loss and gradient by Hugging Face name."""
        weights = {name: weight.clone().requires_grad_() for name, weight in world.weights("policy").items()}
        loss = self.loss(weights, world)
        return float(loss.detach()), dense.gradients(loss, weights)


def _responses(examples: list[Example]) -> list[tuple[dense.Response, ...]]:
    return [tuple(dense.Response(s.tokens, s.prompt_length) for s in example.sequences) for example in examples]


def _sft() -> AlgorithmCheck:
    def loss(weights: dense.Weights, world: World) -> Tensor:
        return dense.sft(weights, world.shape, [response for (response,) in _responses(world.singles)])

    return AlgorithmCheck("sft", words=3, loss=loss)


def _dpo(algorithm: str, swapped: bool) -> AlgorithmCheck:
    beta, smoothing = 0.3, 0.1

    def loss(weights: dense.Weights, world: World) -> Tensor:
        pairs = [(b, a) if swapped else (a, b) for a, b in _responses(world.pairs)]
        return dense.dpo(weights, world.weights("initial"), world.shape, pairs, beta, smoothing)

    settings = {"dpo.beta": beta, "dpo.label_smoothing": smoothing, "dpo.reference_path": "initial"}
    return AlgorithmCheck(algorithm, words=3 + 3, loss=loss, pairs=True, settings=settings)  # policy, reference


def _aligndistil(reward: str, weight: str, measure_initial_kl: bool = False, **changed: Any) -> AlgorithmCheck:
    how: dict[str, Any] = {
        "reward": reward,
        "weight": weight,
        "alpha": 3.0,
        "epsilon": 1e-2,
        "beta0": 0.1,
        "tvd_scale": 1.0,
        "normalize_by_length": True,
        **changed,
    }
    other = "reverse" if reward == "contrastive" else "initial"

    def loss(weights: dense.Weights, world: World) -> Tensor:
        responses = [response for (response,) in _responses(world.singles)]
        teachers = world.weights("dpo"), world.weights(other)
        return dense.aligndistil(weights, *teachers, world.shape, responses, dense.Distillation(**how))

    keys = {**how, "dpo_path": "dpo", "initial_path": "initial", "measure_initial_kl": measure_initial_kl}
    if reward == "contrastive":
        keys["reverse_dpo_path"] = "reverse"
    settings = {f"aligndistil.{key}": value for key, value in keys.items()}
    # The teacher's scalars, the policy's step, the distance to the initial model; sums of the statistics for metrics.
    words = 7 + 3 + (5 if measure_initial_kl else 0)
    return AlgorithmCheck("aligndistil", words=words, loss=loss, settings=settings, words_a_batch=2)


ALGORITHM_CHECKS: Mapping[str, AlgorithmCheck] = {
    "sft": _sft(),
    "dpo": _dpo("dpo", swapped=False),
    "reverse_dpo": _dpo("reverse_dpo", swapped=True),
    "aligndistil": _aligndistil("contrastive", "adaptive"),
    "aligndistil authors": _aligndistil(
        "contrastive", "adaptive", measure_initial_kl=True, tvd_scale=2.0, normalize_by_length=False
    ),
    "aligndistil constant": _aligndistil("contrastive", "constant"),
    "aligndistil vanilla": _aligndistil("vanilla", "adaptive"),
    "aligndistil vanilla constant": _aligndistil("vanilla", "constant"),
}
