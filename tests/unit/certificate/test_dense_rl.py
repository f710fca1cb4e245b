"""The dense references of reinforcement learning by hand, and that the certificate's data goes through every branch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_aligndistil.certificate import dense_rl
from megatron_aligndistil.certificate.algorithms import LEAST_DISTANCE, PPO, RTO, rollout
from megatron_aligndistil.certificate.dense_model import Response, response_logprobs, scalars
from megatron_aligndistil.certificate.models import World, architecture_for
from megatron_aligndistil.parallel.setup import Layout

RESPONSE = Response(np.array([3, 1, 4, 1, 5], np.int32), 2)


@pytest.fixture(scope="module")
def world():
    return World(architecture_for(Layout(), tied=True))


def values_of(world, own):
    response = own.response
    return scalars(world.weights("critic"), world.shape, response.tokens)[response.prompt_length - 1 : -1].tolist()


def ratios_of(world, own):
    logprobs = response_logprobs(world.weights("policy"), world.shape, own.response).tolist()
    return [math.exp(new - old) for new, old in zip(logprobs, own.old_logprobs, strict=True)]


@pytest.mark.parametrize("how", [PPO, RTO], ids=["ppo", "rto"])
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=4), Layout(tensor=8), Layout(pipeline=2, virtual_pipeline=2)], ids=str
)
def test_clipping_binds_for_some_tokens_and_not_for_others(layout, how):
    every_actor = set()
    for tied in (True, False):
        world = World(architecture_for(layout, tied))
        examples, trajectories = rollout(world, how)
        assert len(examples) >= 6
        actor, critic = set(), set()
        for own in trajectories:
            for ratio, advantage in zip(ratios_of(world, own), own.advantages, strict=True):
                assert abs(abs(ratio - 1) - how.clip) >= LEAST_DISTANCE
                actor.add((int(ratio > 1 + how.clip) - int(ratio < 1 - how.clip), advantage > 0))
            for value, old, target in zip(values_of(world, own), own.old_values, own.returns, strict=True):
                assert abs(abs(value - old) - how.value_clip) >= LEAST_DISTANCE
                held = min(max(value, old - how.value_clip), old + how.value_clip)
                critic.add((abs(value - old) > how.value_clip, abs(held - target) > abs(value - target)))
        every_actor |= actor
        binding = {(-1, False), (1, True)}
        assert actor & binding
        assert actor - binding
        assert {(False, False), (True, False), (True, True)} <= critic
    # A line of the certificate is of both heads: below, inside and above the interval, with advantages of either sign.
    assert len(every_actor) == 6


def test_some_rewards_are_cut_and_others_are_not(world):
    scores = [
        dense_rl.score(world.weights, world.shape, Response(s.tokens, s.prompt_length), PPO)
        for (s,) in (example.sequences for example in world.singles)
    ]
    assert {abs(score) == PPO.reward_clip for score in scores} == {True, False}


def test_advantages_and_returns_without_discount_are_sums(world):
    """γ = λ = 1: A_t + V_t is the sum of the rewards from t on."""
    how = replace(PPO, discount=1.0, gae_lambda=1.0, kl_coef=0.5)
    own = dense_rl.trajectory(world.weights, world.shape, RESPONSE, how)
    initial = response_logprobs(world.weights("initial"), world.shape, RESPONSE).tolist()
    penalties = [0.5 * (old - reference) for old, reference in zip(own.old_logprobs, initial, strict=True)]
    score = dense_rl.score(world.weights, world.shape, RESPONSE, how)
    assert own.returns == pytest.approx([score - sum(penalties[t:]) for t in range(3)], rel=1e-12)
    assert [a + v for a, v in zip(own.advantages, own.old_values, strict=True)] == pytest.approx(own.returns)
    last = dense_rl.trajectory(world.weights, world.shape, RESPONSE, replace(how, gae_lambda=0.0))
    assert last.advantages[0] == pytest.approx(-penalties[0] + own.old_values[1] - own.old_values[0])


def test_whitening(world):
    trajectories = rollout(world, PPO)[1]
    advantages = torch.tensor([a for own in trajectories for a in own.advantages], dtype=torch.float64)
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(advantages.std()) == pytest.approx(1.0, rel=1e-6)


def test_losses_of_a_policy_that_has_not_moved(world):
    """ρ = 1 and V = V_old: nothing is clipped, the actor's terms are -A, the critic's ½ A² before whitening."""
    trajectories = rollout(world, RTO)[1]
    advantages = torch.tensor([a for own in trajectories for a in own.advantages], dtype=torch.float64)
    actor = dense_rl.actor(world.weights("old"), world.shape, trajectories, RTO)
    critic = dense_rl.critic(world.weights("old critic"), world.shape, trajectories, RTO)
    assert torch.allclose(actor, -advantages, rtol=1e-12)
    assert torch.allclose(critic, 0.5 * advantages.square(), rtol=1e-9)


def test_a_reward_model_without_a_preference(world):
    """A pair of one response twice: log 2 and λ (2 r)²."""
    score = float(scalars(world.weights("reward"), world.shape, RESPONSE.tokens)[-1])
    (loss,) = dense_rl.reward_model(world.weights("reward"), world.shape, [(RESPONSE, RESPONSE)], 0.5).tolist()
    assert loss == pytest.approx(math.log(2) + 0.5 * (2 * score) ** 2)
