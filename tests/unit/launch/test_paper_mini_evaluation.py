"""The miniature's figures against direct computations: win rates, the reward model's scores, the KL to SFT."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_aligndistil.evaluation.contrastive import predict
from megatron_aligndistil.launch.paper_mini_evaluation import agreement, mean_kl, scores, win_rate
from megatron_aligndistil.types import Sequence
from tests.tiny_models import tiny_model, tiny_reward_model

LENGTHS = ((7, 3), (12, 5), (9, 8))  # tokens, of which the prompt's


def sequences(vocab_size: int) -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [Sequence(rng.integers(0, vocab_size - 1, size=length).astype(np.int32), p) for length, p in LENGTHS]


def test_the_win_rate_is_over_all_pairs_of_answers_to_a_prompt() -> None:
    assert win_rate(np.array([[1.0, 3.0], [0.0, 0.0]]), np.array([[2.0, 1.0], [0.0, -1.0]])) == (0.5 + 2 + 1 + 2) / 8
    same = np.array([[1.0, 2.0, 2.0], [5.0, 4.0, 4.0]])
    assert win_rate(same, same) == 0.5


def test_the_kl_is_that_of_whole_distributions_at_the_response_tokens() -> None:
    policy, reference = (tiny_model("qwen2").to(torch.float64) for _ in range(2))
    with torch.no_grad():
        policy.model.embed_tokens.weight.mul_(1.1)
    rows = sequences(301)
    kls = []
    for row in rows:
        tokens = torch.as_tensor(row.tokens, dtype=torch.int64)[None]
        with torch.no_grad():
            log_p, log_q = (m(input_ids=tokens).logits[0].log_softmax(-1) for m in (policy, reference))
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1)[row.prompt_length - 1 : -1])
    found = mean_kl(predict(policy, rows, 2), predict(reference, rows, 2))
    assert found == pytest.approx(float(torch.cat(kls).mean()), rel=1e-9)
    assert found > 1e-3
    assert mean_kl(predict(policy, rows, 2), predict(policy, rows, 2)) == 0.0


def test_the_reward_model_scores_the_last_token() -> None:
    judge = tiny_reward_model("qwen2")
    rows = sequences(301)
    with torch.no_grad():
        own = [float(judge(input_ids=torch.as_tensor(row.tokens, dtype=torch.int64)[None]).logits) for row in rows]
    assert np.std(own) > 0.01
    assert scores(judge, rows) == pytest.approx(own, rel=1e-5)


def test_agreement_is_over_answers_to_the_same_prompt_whose_rewards_differ() -> None:
    rewards = np.array([[1.0, 2.0, 2.0], [3.0, 0.0, 1.0]])
    # The first prompt: one of two pairs is right. The second: a tie, a right one, a wrong one.
    assert agreement(np.array([[0.5, 0.4, 0.6], [5.0, 5.0, 4.0]]), rewards) == (1 + 0.5 + 1 + 0) / 5
    assert agreement(rewards, rewards) == 1.0
    assert math.isnan(agreement(rewards[:, :1], rewards[:, :1]))
