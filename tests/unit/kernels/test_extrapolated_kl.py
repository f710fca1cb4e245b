"""teacher_scalars and extrapolated_kl on one rank against the dense float64 reference."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from megatron_aligndistil.kernels.extrapolated_kl import (
    ExtrapolatedKL,
    Extrapolation,
    Teacher,
    extrapolated_kl,
    teacher_scalars,
)
from megatron_aligndistil.kernels.extrapolated_kl.reference import dense_extrapolated_kl, dense_teacher_scalars
from megatron_aligndistil.kernels.head_product import HeadProduct
from megatron_aligndistil.types import VocabHead
from tests.unit.kernels.problems import (
    ADAPTIVE,
    CONSTANT,
    GRADIENT_TOLERANCE,
    Model,
    Shape,
    models,
    relative_error,
    true_rows,
    upstream,
)
from tests.unit.kernels.recorder import recorded


def _run(
    three: list[Model], extrapolation: Extrapolation, chunk_tokens: int
) -> tuple[Tensor, VocabHead, Teacher, ExtrapolatedKL]:
    policy, d, r = three
    hidden_TH, head = policy.leaf()
    pair = (*d.leaf(), *r.leaf())
    teacher = Teacher(*pair, scalars=teacher_scalars(*pair, extrapolation, chunk_tokens))
    return hidden_TH, head, teacher, extrapolated_kl(hidden_TH, head, teacher, chunk_tokens)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
@pytest.mark.parametrize("extrapolation", [ADAPTIVE, CONSTANT], ids=["adaptive", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_equals_the_reference(dtype: torch.dtype, extrapolation: Extrapolation, chunk_tokens: int) -> None:
    shape = Shape()
    three = models(shape, dtype)
    hidden_TH, head, teacher, result = _run(three, extrapolation, chunk_tokens)
    policy, d, r = (model.dense() for model in three)
    expected = dense_extrapolated_kl(policy, d, r, extrapolation)
    weights_T = upstream(shape.tokens, dtype)
    (weights_T * result.kl).sum().backward()
    (weights_T.double() * expected.kl).sum().backward()
    tolerance = GRADIENT_TOLERANCE[dtype]

    expected_scalars = dense_teacher_scalars(d, r, extrapolation)
    for name in (field.name for field in fields(expected_scalars)):
        actual_T = getattr(teacher.scalars, name)
        assert actual_T.dtype == dtype
        assert relative_error(actual_T, getattr(expected_scalars, name)) <= tolerance, name
    for name in (field.name for field in fields(expected)):
        actual_T, expected_T = getattr(result, name), getattr(expected, name).detach()
        assert actual_T.dtype == dtype
        assert actual_T.requires_grad == (name == "kl")
        assert relative_error(actual_T.detach(), expected_T) <= tolerance, name
    assert relative_error(hidden_TH.grad, policy.hidden_TH.grad) <= tolerance
    vocab = three[0].vocab_size
    assert relative_error(true_rows(head.weight.grad, vocab), true_rows(policy.weight_VH.grad, vocab)) <= tolerance
    assert not head.weight.grad[vocab:].any()
    frozen = (teacher.hidden_d_TH, teacher.head_d.weight, teacher.hidden_r_TH, teacher.head_r.weight)
    assert all(tensor.grad is None for tensor in frozen)


def test_bf16_inputs_give_fp32_statistics() -> None:
    shape = Shape(tokens=64, hidden=64, vocab=1000, padded=1024)
    three = models(shape, torch.bfloat16)
    hidden_TH, head, _, result = _run(three, ADAPTIVE, 16)
    policy, d, r = (model.dense() for model in three)
    expected = dense_extrapolated_kl(policy, d, r, ADAPTIVE)
    result.kl.sum().backward()
    expected.kl.sum().backward()
    assert result.kl.dtype == torch.float32
    assert relative_error(result.kl.detach(), expected.kl.detach()) <= 1e-5
    assert relative_error(hidden_TH.grad, policy.hidden_TH.grad) <= 2**-8  # rounded to bf16 once
    assert relative_error(head.weight.grad[:1000], policy.weight_VH.grad[:1000]) <= 2**-8


def test_no_token_gives_zero_gradients() -> None:
    hidden_TH, head, _, result = _run(models(Shape(tokens=0), torch.float32), ADAPTIVE, 4)
    result.kl.sum().backward()
    assert result.kl.shape == result.reward.shape == (0,)
    assert hidden_TH.grad.shape == (0, 24)
    assert head.weight.grad.shape == (64, 24)
    assert not head.weight.grad.any()


def test_two_heads_that_are_one_and_a_policy_that_is_its_teacher() -> None:
    """The vanilla start: policy, d and r share one weight; the gradient is the policy's alone."""
    policy, d, _ = models(Shape(), torch.float64)
    hidden_TH, head = policy.leaf()
    hidden_d_TH, _ = d.leaf()
    pair = (hidden_d_TH, head, hidden_TH.detach(), head)
    teacher = Teacher(*pair, scalars=teacher_scalars(*pair, ADAPTIVE, 4))
    extrapolated_kl(hidden_TH, head, teacher, 4).kl.sum().backward()

    dense_policy, frozen = policy.dense(), policy.dense()
    dense_d = type(frozen)(d.dense().hidden_TH, frozen.weight_VH, frozen.vocab_size)
    dense_extrapolated_kl(dense_policy, dense_d, frozen, ADAPTIVE).kl.sum().backward()
    assert relative_error(hidden_TH.grad, dense_policy.hidden_TH.grad) <= 1e-10
    assert relative_error(head.weight.grad[:53], dense_policy.weight_VH.grad[:53]) <= 1e-10


def test_mixed_precisions_of_hidden_states_and_head() -> None:
    """fp32 hidden states of a final norm with a bf16 head."""
    (model,) = models(Shape(), torch.float32, count=1)
    head = VocabHead(model.weight_VH.bfloat16(), model.vocab_size)
    logits_TV = HeadProduct(model.hidden_TH, head, torch.float32).logits_CV(slice(0, 13))
    expected_TV = model.hidden_TH.double() @ head.weight[: model.vocab_size].double().t()
    assert logits_TV.dtype == torch.float32
    assert relative_error(logits_TV, expected_TV) <= 1e-6


def test_no_tensor_of_all_tokens_by_vocabulary_exists() -> None:
    shape = Shape(tokens=512, hidden=8, vocab=1021, padded=1024)
    chunk_tokens = 32
    three = models(shape, torch.bfloat16)

    def step() -> None:
        _run(three, ADAPTIVE, chunk_tokens)[3].kl.sum().backward()

    _, recorder = recorded(step)
    assert recorder.largest == chunk_tokens * shape.vocab  # a sixteenth of [T, V]


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be 'adaptive' or 'constant', got 'adaptiv'"):
        Extrapolation(mode="adaptiv", alpha=1.0, epsilon=1e-3, tvd_scale=1.0)  # type: ignore[arg-type]
