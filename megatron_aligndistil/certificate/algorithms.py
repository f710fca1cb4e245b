"""The algorithms' checks: for each its settings, the words a response token that it must send, and its dense loss."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_aligndistil.certificate import dense_model as dense
from megatron_aligndistil.certificate import dense_rl
from megatron_aligndistil.certificate.algorithm_check import AlgorithmCheck, pairs, responses_of
from megatron_aligndistil.certificate.models import World
from megatron_aligndistil.certificate.preferences import PREFERENCE_CHECKS
from megatron_aligndistil.types import Example

# How far a token of PPO's is from where its gradient jumps, in ratios and in units of reward: much further than
# rounding reaches in float32, so that both sides clip the same tokens.
LEAST_DISTANCE = 1e-3


def _sft() -> AlgorithmCheck:
    def loss(weights: dense.Weights, world: World) -> Tensor:
        return dense.sft(weights, world.shape, [response for (response,) in responses_of(world.singles)])

    return AlgorithmCheck("sft", words=3, loss=loss)


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
        responses = [response for (response,) in responses_of(world.singles)]
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
        given = [(chosen, rejected) for chosen, rejected in responses_of(world.pairs)]
        return dense_rl.reward_model(weights, world.shape, given, regularisation)

    settings = {"reward_model.margin_regularisation": regularisation}
    return AlgorithmCheck("reward_model", words=0, loss=loss, examples=pairs, settings=settings, trained="reward")


def _policy_gradient(algorithm: str, **how: Any) -> AlgorithmCheck:
    def loss(weights: dense.Weights, world: World) -> Tensor:
        responses = [response for (response,) in responses_of(world.singles)]
        settings = dense_rl.PolicyGradient(algorithm == "sentence_pg", **how)
        return dense_rl.policy_gradient(weights, world.weights, world.shape, responses, settings)

    settings = {f"pg.{key}": value for key, value in how.items()}
    settings |= {"pg.dpo_path": "dpo", "pg.reverse_dpo_path": "reverse"}
    return AlgorithmCheck(algorithm, words=3, loss=loss, settings=settings)


@functools.cache
def rollout(world: World, how: dense_rl.PPO) -> tuple[list[Example], list[dense_rl.Trajectory]]:
    """The world's responses none of whose tokens is within ``LEAST_DISTANCE`` of a border, and their experience."""
    kept = []
    for example, (response,) in zip(world.singles, responses_of(world.singles), strict=True):
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

ALGORITHM_CHECKS: dict[str, AlgorithmCheck] = {
    "sft": _sft(),
    **PREFERENCE_CHECKS,
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
# A loss doesn't see what is trained: one algorithm of each kind of model, teacher and reference is enough.
_OF_ADAPTERS = ("sft", "dpo", "aligndistil", "reward_model", "ppo", "ppo critic")
ALGORITHM_CHECKS |= {f"{name} lora": replace(ALGORITHM_CHECKS[name], lora=True) for name in _OF_ADAPTERS}
