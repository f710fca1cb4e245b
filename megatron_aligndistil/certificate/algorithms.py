"""The algorithms' checks: for each its settings, the words a response token that it must send, and its dense loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.certificate import dense_model as dense
from megatron_aligndistil.certificate import dense_rl
from megatron_aligndistil.certificate.models import World
from megatron_aligndistil.config.compose import SCHEMAS
from megatron_aligndistil.config.schema import KernelConfig, RunConfig
from megatron_aligndistil.types import Example

# How far a token of PPO's is from where its gradient jumps, in ratios and in units of reward: much further than
# rounding reaches in float32, so that both sides clip the same tokens.
LEAST_DISTANCE = 1e-3


def _singles(world: World) -> list[Example]:
    return world.singles


def _pairs(world: World) -> list[Example]:
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
    """

    algorithm: str
    words: int
    loss: Callable[[dense.Weights, World], Tensor]
    examples: Callable[[World], list[Example]] = _singles
    settings: Mapping[str, Any] = field(default_factory=dict)
    words_a_batch: int = 0
    trained: str = "policy"

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
        weights = {name: weight.clone().requires_grad_() for name, weight in world.weights(self.trained).items()}
        terms = self.loss(weights, world)
        gradients = dense.gradients(terms.mean(), weights)
        terms = terms.detach()
        return Reference(DenseLoss(float(terms.mean()), float(terms.abs().mean())), gradients)


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
    return AlgorithmCheck(algorithm, words=3 + 3, loss=loss, examples=_pairs, settings=settings)  # policy, reference


def _aligndistil(
    reward: str,
    weight: str,
    measure_initial_kl: bool = False,
    source: str = "dataset",
    measure_token_reward: bool = False,
    **changed: Any,
) -> AlgorithmCheck:
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

    measured = {"measure_initial_kl": measure_initial_kl, "measure_token_reward": measure_token_reward}
    keys = {**how, **measured, "source": source, "dpo_path": "dpo", "initial_path": "initial"}
    if reward == "contrastive":
        keys["reverse_dpo_path"] = "reverse"
    settings = {f"aligndistil.{key}": value for key, value in keys.items()}
    # The teacher's scalars, the policy's step, the distance to the initial model, two log-probs of the responses; sums
    # of the statistics for metrics.
    words = 7 + 3 + (5 if measure_initial_kl else 0) + (2 * 3 if measure_token_reward else 0)
    return AlgorithmCheck("aligndistil", words=words, loss=loss, settings=settings, words_a_batch=2)


def _reward_model() -> AlgorithmCheck:
    regularisation = 0.05

    def loss(weights: dense.Weights, world: World) -> Tensor:
        pairs = [(chosen, rejected) for chosen, rejected in _responses(world.pairs)]
        return dense_rl.reward_model(weights, world.shape, pairs, regularisation)

    settings = {"reward_model.margin_regularisation": regularisation}
    return AlgorithmCheck("reward_model", words=0, loss=loss, examples=_pairs, settings=settings, trained="reward")


def _policy_gradient(algorithm: str, **how: Any) -> AlgorithmCheck:
    def loss(weights: dense.Weights, world: World) -> Tensor:
        responses = [response for (response,) in _responses(world.singles)]
        settings = dense_rl.PolicyGradient(algorithm == "sentence_pg", **how)
        return dense_rl.policy_gradient(weights, world.weights, world.shape, responses, settings)

    settings = {f"pg.{key}": value for key, value in how.items()}
    settings |= {"pg.dpo_path": "dpo", "pg.reverse_dpo_path": "reverse"}
    return AlgorithmCheck(algorithm, words=3, loss=loss, settings=settings)


@functools.cache
def rollout(world: World, how: dense_rl.PPO) -> tuple[list[Example], list[dense_rl.Trajectory]]:
    """The world's responses none of whose tokens is within ``LEAST_DISTANCE`` of a border, and their experience."""
    kept = []
    for example, (response,) in zip(world.singles, _responses(world.singles), strict=True):
        own = dense_rl.trajectory(world.weights, world.shape, response, how)
        if dense_rl.distance_to_a_border(world.weights, world.shape, own, how) >= LEAST_DISTANCE:
            kept.append((example, own))
    trajectories = [own for _, own in kept]
    return [e for e, _ in kept], dense_rl.whitened(trajectories) if how.whiten_advantages else trajectories


def _ppo(algorithm: str, trained: str, how: dense_rl.PPO) -> AlgorithmCheck:
    minimised = dense_rl.critic if trained == "critic" else dense_rl.actor

    def loss(weights: dense.Weights, world: World) -> Tensor:
        return minimised(weights, world.shape, rollout(world, how)[1], how)

    own = ("kl_coef", "clip", "value_clip", "discount", "gae_lambda", "whiten_advantages")
    settings = {f"ppo.{key}": getattr(how, key) for key in own} | {"ppo.reference_path": "initial"}
    settings |= {"reward.source": how.reward, "reward.clip": how.reward_clip, "reward.beta0": how.beta0}
    if how.reward == "model":
        settings["reward.path"] = "reward"
    else:
        settings |= {"reward.dpo_path": "dpo", "reward.reverse_dpo_path": "reverse"}
    if algorithm == "rto":
        settings |= {"rto.beta1": how.beta1, "rto.dpo_path": "dpo"}
    words = 0 if trained == "critic" else 3  # values are whole on every tensor rank
    return AlgorithmCheck(
        algorithm, words, loss, examples=lambda world: rollout(world, how)[0], settings=settings, trained=trained
    )


PPO = dense_rl.PPO(
    reward="model",
    beta0=0.1,
    reward_clip=1.0,
    beta1=0.0,
    kl_coef=0.1,
    clip=0.2,
    value_clip=0.2,
    discount=0.97,
    gae_lambda=0.9,
    whiten_advantages=True,
)
RTO = replace(
    PPO,
    reward="contrastive",
    beta0=0.3,
    reward_clip=None,
    beta1=0.2,
    discount=1.0,
    gae_lambda=0.5,
    whiten_advantages=False,
)

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
    "aligndistil on-policy": _aligndistil("contrastive", "adaptive", source="rollout", measure_token_reward=True),
    "reward_model": _reward_model(),
    "ppo": _ppo("ppo", "policy", PPO),
    "ppo critic": _ppo("ppo", "critic", PPO),
    "rto": _ppo("rto", "policy", RTO),
    "rto critic": _ppo("rto", "critic", RTO),
    "sentence_pg": _policy_gradient("sentence_pg", beta0=0.1, beta=0.08, normalize_by_length=True),
    "token_pg": _policy_gradient("token_pg", beta0=0.3, beta=0.2, normalize_by_length=False),
}
