"""The scalar policy gradient's surrogate and its weights against loops over tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aligndistil.losses.policy_gradient import length_weights, policy_gradient_loss
from megatron_aligndistil.types import IGNORED_SEQUENCE, Batch

numbers = st.floats(-5, 5)


def batch(lengths: list[int], padding: int = 2) -> Batch:
    """A packed row of a prompt of two tokens and a response each."""
    ids, mask = [], []
    for n, length in enumerate(lengths):
        ids += [n] * (length + 2)
        mask += [False] + [True] * length + [False]
    ids, mask = [*ids, *[IGNORED_SEQUENCE] * padding], [*mask, *[False] * padding]
    zeros_BS = torch.zeros(1, len(ids), dtype=torch.int64)
    return Batch(
        tokens=zeros_BS,
        labels=zeros_BS,
        loss_mask=torch.tensor([mask]),
        position_ids=zeros_BS,
        sequence_ids=torch.tensor([ids]),
        response_lengths=torch.tensor(lengths),
        origins=("f:0",) * len(lengths),
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_every_sequence_weighs_its_length_or_one(lengths: list[int]) -> None:
    here = batch(lengths)
    assert length_weights(here, False).tolist() == [1.0] * sum(lengths)
    weight_T = length_weights(here, True)
    assert weight_T.dtype == torch.float64
    assert weight_T.tolist() == [1 / length for length in lengths for _ in range(length)]
    np.testing.assert_allclose(here.sum_by_sequence(weight_T), 1, rtol=1e-14)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(numbers, st.one_of(st.just(0.0), numbers), st.floats(0, 1)), max_size=12))
def test_value_and_gradient_equal_the_loop(rows: list[tuple[float, float, float]]) -> None:
    columns_T3 = torch.tensor([x for row in rows for x in row], dtype=torch.float64).view(-1, 3)
    logprob_T, advantage_T, weight_T = (x_T.clone().requires_grad_() for x_T in columns_T3.T)
    output = policy_gradient_loss(logprob_T, advantage_T, weight_T, 3)
    gradients = torch.autograd.grad(output.total, (logprob_T, advantage_T, weight_T), allow_unused=True)
    total, gradient = 0.0, []
    for logprob, advantage, weight in rows:
        total -= weight * advantage * logprob
        gradient.append(-weight * advantage)
    assert output.total.item() == pytest.approx(total, rel=1e-12, abs=1e-12)
    assert gradients[0].tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-12)
    assert gradients[1:] == (None, None)
    assert output.count == 3


def test_the_loss_has_the_type_of_the_logprobs() -> None:
    logprob_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    weight_T, advantage_T = length_weights(batch([2]), True), torch.ones(2, dtype=torch.float64)
    assert policy_gradient_loss(logprob_T, advantage_T, weight_T, 1).total.dtype == torch.float32
