"""token_kl on one rank against the dense float64 reference."""

from __future__ import annotations

import pytest
import torch

from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_kl import token_kl
from megatron_aligndistil.kernels.token_kl.dispatch import Direction
from megatron_aligndistil.kernels.token_kl.reference import dense_token_kl
from megatron_aligndistil.types import VocabHead
from tests.unit.kernels.problems import (
    GRADIENT_TOLERANCE,
    Shape,
    every_way,
    models,
    relative_error,
    takes,
    true_rows,
    upstream,
    way_id,
)


@pytest.mark.parametrize("direction", ["to_other", "from_other"])
@pytest.mark.parametrize("settings", every_way(), ids=way_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_weighted_gradient_equal_the_reference(
    dtype: torch.dtype, settings: KernelSettings, direction: Direction
) -> None:
    if not takes(settings, dtype):
        pytest.skip("the compiled loops have no float64")
    shape = Shape()
    policy, other = models(shape, dtype, count=2)
    hidden_TH, head = policy.leaf()
    other_hidden_TH, other_head = other.leaf()
    weights_T = upstream(shape.tokens, dtype)
    dense, dense_other = policy.dense(), other.dense()
    kl_T = token_kl(hidden_TH, head, other_hidden_TH, other_head, settings, direction)
    weights = dense.hidden_TH, dense.weight_VH, dense_other.hidden_TH, dense_other.weight_VH
    expected_T = dense_token_kl(*weights, policy.vocab_size, from_other=direction == "from_other")
    (weights_T * kl_T).sum().backward()
    (weights_T.double() * expected_T).sum().backward()

    assert kl_T.dtype == dtype
    assert relative_error(kl_T.detach(), expected_T.detach()) <= GRADIENT_TOLERANCE[dtype]
    assert relative_error(hidden_TH.grad, dense.hidden_TH.grad) <= GRADIENT_TOLERANCE[dtype]
    expected_VH = true_rows(dense.weight_VH.grad, policy.vocab_size)
    assert relative_error(true_rows(head.weight.grad, policy.vocab_size), expected_VH) <= GRADIENT_TOLERANCE[dtype]
    assert not head.weight.grad[policy.vocab_size :].any()
    assert other_hidden_TH.grad is None
    assert other_head.weight.grad is None


def test_models_of_different_widths_compare() -> None:
    (policy,) = models(Shape(), torch.float64, count=1)
    (other,) = models(Shape(hidden=7), torch.float64, count=1)
    hidden_TH, head = policy.leaf()
    other_hidden_TH, other_head = other.leaf()
    kl_T = token_kl(hidden_TH, head, other_hidden_TH, other_head, KernelSettings())
    expected_T = dense_token_kl(policy.hidden_TH, policy.weight_VH, other.hidden_TH, other.weight_VH, policy.vocab_size)
    assert relative_error(kl_T.detach(), expected_T) <= 1e-12


def test_heads_of_different_vocabularies_are_refused() -> None:
    policy, other = models(Shape(), torch.float32, count=2)
    hidden_TH, head = policy.leaf()
    other_hidden_TH, other_head = other.leaf()
    with pytest.raises(ValueError, match="heads must hold the same columns"):
        token_kl(hidden_TH, head, other_hidden_TH, VocabHead(other_head.weight, 52), KernelSettings())
    with pytest.raises(ValueError, match="hidden states of 13 and of 12 tokens"):
        token_kl(hidden_TH, head, other_hidden_TH[1:], other_head, KernelSettings())


def test_unknown_direction_is_refused() -> None:
    policy, other = models(Shape(), torch.float32, count=2)
    with pytest.raises(ValueError, match="direction must be 'to_other' or 'from_other', got 'reverse'"):
        token_kl(*policy.leaf(), *other.leaf(), KernelSettings(), "reverse")  # type: ignore[arg-type]
