"""teacher_scalars and extrapolated_kl on one rank against the dense float64 reference."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aligndistil.certificate.recorder import recorded
from megatron_aligndistil.kernels.backends.choice import choose
from megatron_aligndistil.kernels.extrapolated_kl import (
    ExtrapolatedKL,
    Extrapolation,
    Teacher,
    extrapolated_kl,
    summed_statistics,
    teacher_scalars,
    token_statistics,
)
from megatron_aligndistil.kernels.extrapolated_kl.reference import (
    dense_extrapolated_kl,
    dense_teacher_scalars,
    dense_token_statistics,
)
from megatron_aligndistil.kernels.settings import KernelSettings, Size, Tiling
from megatron_aligndistil.types import VocabHead
from tests.unit.kernels.problems import (
    ADAPTIVE,
    CONSTANT,
    GRADIENT_TOLERANCE,
    Model,
    Shape,
    every_way,
    models,
    relative_error,
    skip_without_bf16,
    takes,
    true_rows,
    upstream,
    way_id,
)


def _run(
    three: list[Model], extrapolation: Extrapolation, settings: KernelSettings
) -> tuple[Tensor, VocabHead, Teacher, ExtrapolatedKL]:
    policy, d, r = three
    hidden_TH, head = policy.leaf()
    pair = (*d.leaf(), *r.leaf())
    teacher = Teacher(*pair, scalars=teacher_scalars(*pair, extrapolation, settings))
    return hidden_TH, head, teacher, extrapolated_kl(hidden_TH, head, teacher, settings)


@pytest.mark.parametrize("settings", every_way(), ids=way_id)
@pytest.mark.parametrize("extrapolation", [ADAPTIVE, CONSTANT], ids=["adaptive", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_equals_the_reference(
    dtype: torch.dtype, extrapolation: Extrapolation, settings: KernelSettings
) -> None:
    if not takes(settings, dtype):
        pytest.skip("the compiled loops have no float64")
    shape = Shape()
    three = models(shape, dtype)
    hidden_TH, head, teacher, result = _run(three, extrapolation, settings)
    policy, d, r = (model.dense() for model in three)
    expected_T = dense_extrapolated_kl(policy, d, r, extrapolation)
    weights_T = upstream(shape.tokens, dtype)
    (weights_T * result.kl).sum().backward()
    (weights_T.double() * expected_T).sum().backward()
    tolerance = GRADIENT_TOLERANCE[dtype]

    expected_scalars = dense_teacher_scalars(d, r, extrapolation)
    for name in (field.name for field in fields(expected_scalars)):
        actual_T = getattr(teacher.scalars, name)
        assert actual_T.dtype == dtype
        assert relative_error(actual_T, getattr(expected_scalars, name)) <= tolerance, name
    assert result.kl.dtype == dtype
    assert relative_error(result.kl.detach(), expected_T.detach()) <= tolerance
    statistics, expected = token_statistics(result, teacher, None), dense_token_statistics(policy, d, r)
    sums = summed_statistics(result, teacher, None)
    for name in (field.name for field in fields(expected)):
        actual_T, wanted_T = getattr(statistics, name), getattr(expected, name)
        assert not actual_T.requires_grad
        assert relative_error(actual_T, wanted_T) <= tolerance, name
        assert relative_error(getattr(sums, name), wanted_T.sum()) <= 2 * tolerance, name
    assert relative_error(hidden_TH.grad, policy.hidden_TH.grad) <= tolerance
    vocab = three[0].vocab_size
    assert relative_error(true_rows(head.weight.grad, vocab), true_rows(policy.weight_VH.grad, vocab)) <= tolerance
    assert not head.weight.grad[vocab:].any()
    frozen = (teacher.hidden_d_TH, teacher.head_d.weight, teacher.hidden_r_TH, teacher.head_r.weight)
    assert all(tensor.grad is None for tensor in frozen)


@pytest.mark.parametrize("settings", every_way((16,)), ids=way_id)
def test_bf16_is_no_further_from_float64_than_dense_bf16(settings: KernelSettings) -> None:
    skip_without_bf16(settings.backend)
    shape = Shape(tokens=64, hidden=64, vocab=1000, padded=1024)
    three = models(shape, torch.bfloat16)
    hidden_TH, head, _, result = _run(three, ADAPTIVE, settings)
    policy, d, r = (model.dense() for model in three)
    expected_T = dense_extrapolated_kl(policy, d, r, ADAPTIVE)
    result.kl.sum().backward()
    expected_T.sum().backward()
    dense_hidden_TH, dense_weight_VH, dense_kl_T = _dense_bf16(three)
    assert result.kl.dtype == torch.float32
    assert relative_error(result.kl.detach(), expected_T.detach()) <= 1e-5
    for actual, dense, expected in (
        (result.kl.detach(), dense_kl_T, expected_T.detach()),
        (hidden_TH.grad, dense_hidden_TH, policy.hidden_TH.grad),
        (head.weight.grad[:1000], dense_weight_VH[:1000], policy.weight_VH.grad[:1000]),
    ):
        assert relative_error(actual, expected) <= relative_error(dense, expected) + 1e-6
        assert relative_error(actual, expected) <= 2**-7  # rounded to bf16 twice


def _dense_bf16(three: list[Model]) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dW, KL) as a plain bf16 implementation has them: bf16 logits, fp32 softmaxes."""
    hidden_TH, weight_VH = (x.detach().clone().requires_grad_() for x in (three[0].hidden_TH, three[0].weight_VH))
    vocab = three[0].vocab_size
    logits_TV = (hidden_TH @ weight_VH[:vocab].t()).float()
    d_TV, r_TV = ((model.hidden_TH @ model.weight_VH[:vocab].t()).float() for model in three[1:])
    tvd_T1 = (d_TV.softmax(-1) - r_TV.softmax(-1)).abs().sum(-1, keepdim=True) / 2
    target_TV = (d_TV + (ADAPTIVE.alpha * tvd_T1 + ADAPTIVE.epsilon) * (d_TV - r_TV)).log_softmax(-1)
    logprob_TV = logits_TV.log_softmax(-1)
    kl_T = (logprob_TV.exp() * (logprob_TV - target_TV)).sum(-1)
    gradients = torch.autograd.grad(kl_T.sum(), (hidden_TH, weight_VH))
    return *gradients, kl_T.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", every_way((5,)), ids=way_id)
def test_teachers_with_one_head_are_folded_into_one_product(settings: KernelSettings, dtype: torch.dtype) -> None:
    if not takes(settings, dtype):
        pytest.skip("the compiled loops have no float64")
    policy, d, r = models(Shape(), dtype)
    r = replace(r, weight_VH=d.weight_VH)
    hidden_TH, head = policy.leaf()
    (hidden_d_TH, head_d), (hidden_r_TH, _) = d.leaf(), r.leaf()
    pair = (hidden_d_TH, head_d, hidden_r_TH, head_d)
    teacher = Teacher(*pair, scalars=teacher_scalars(*pair, ADAPTIVE, settings))
    with CountProducts() as unfolded:
        extrapolated_kl(hidden_TH, head, teacher, settings)
    with CountProducts() as folded:
        result = extrapolated_kl(hidden_TH, head, teacher, settings, statistics=False)
    assert (unfolded.products, folded.products) == (9, 6)  # three chunks of three and of two models
    assert result.reward_part is None
    weights_T, dense = upstream(13, dtype), policy.dense()
    expected_T = dense_extrapolated_kl(dense, d.dense(), r.dense(), ADAPTIVE)
    (weights_T * result.kl).sum().backward()
    (weights_T.double() * expected_T).sum().backward()
    assert relative_error(result.kl.detach(), expected_T.detach()) <= GRADIENT_TOLERANCE[dtype]
    assert relative_error(hidden_TH.grad, dense.hidden_TH.grad) <= GRADIENT_TOLERANCE[dtype]
    assert relative_error(head.weight.grad[:53], dense.weight_VH.grad[:53]) <= GRADIENT_TOLERANCE[dtype]


class CountProducts(TorchDispatchMode):
    """Matrix products of the forward pass."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.products += func.name().startswith(("aten::mm", "aligndistil::product"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", every_way((4,)), ids=way_id)
def test_no_token_gives_zero_gradients(settings: KernelSettings) -> None:
    hidden_TH, head, _, result = _run(models(Shape(tokens=0), torch.float32), ADAPTIVE, settings)
    result.kl.sum().backward()
    assert result.kl.shape == result.reward_part.shape == (0,)
    assert hidden_TH.grad.shape == (0, 24)
    assert head.weight.grad.shape == (64, 24)
    assert not head.weight.grad.any()


def test_two_heads_that_are_one_and_a_policy_that_is_its_teacher() -> None:
    """The vanilla start: policy, d and r share one weight; the gradient is the policy's alone."""
    policy, d, _ = models(Shape(), torch.float64)
    hidden_TH, head = policy.leaf()
    hidden_d_TH, _ = d.leaf()
    pair = (hidden_d_TH, head, hidden_TH.detach(), head)
    teacher = Teacher(*pair, scalars=teacher_scalars(*pair, ADAPTIVE, KernelSettings()))
    extrapolated_kl(hidden_TH, head, teacher, KernelSettings()).kl.sum().backward()

    dense_policy, frozen = policy.dense(), policy.dense()
    dense_d = type(frozen)(d.dense().hidden_TH, frozen.weight_VH, frozen.vocab_size)
    dense_extrapolated_kl(dense_policy, dense_d, frozen, ADAPTIVE).sum().backward()
    assert relative_error(hidden_TH.grad, dense_policy.hidden_TH.grad) <= 1e-10
    assert relative_error(head.weight.grad[:53], dense_policy.weight_VH.grad[:53]) <= 1e-10


def test_mixed_precisions_of_hidden_states_and_head() -> None:
    """fp32 hidden states of a final norm with a bf16 head: PyTorch's operators take them."""
    (model,) = models(Shape(), torch.float32, count=1)
    head = VocabHead(model.weight_VH.bfloat16(), model.vocab_size)
    backend = choose(KernelSettings(), (model.hidden_TH, head.weight))
    product = backend.product(model.hidden_TH, head, torch.float32)
    logits_TV = product.empty(13, 53, torch.float32)
    product.logits(slice(0, 13), slice(0, 53), logits_TV)
    expected_TV = model.hidden_TH.double() @ head.weight[: model.vocab_size].double().t()
    assert relative_error(logits_TV, expected_TV) <= 1e-6


@pytest.mark.parametrize("backend", ["pytorch", "native"])
def test_no_tensor_of_all_tokens_by_vocabulary_exists(backend: Any) -> None:
    """The plan R: nothing but tiles. The plan S: the gradient in bf16, and nothing else of that size."""
    skip_without_bf16(backend)
    shape = Shape(tokens=512, hidden=8, vocab=1021, padded=1024)
    three = models(shape, torch.bfloat16)
    largest = {}
    for plan in ("recompute", "store"):
        settings = KernelSettings(plan=plan, chunk_tokens=32, backend=backend)  # type: ignore[arg-type]

        def step(settings: KernelSettings = settings) -> None:
            _run(three, ADAPTIVE, settings)[3].kl.sum().backward()

        _, recorder = recorded(step)
        largest[plan] = recorder.largest
    even = shape.vocab + shape.vocab % 2  # what the compiled products pad columns to
    assert largest["recompute"] <= 32 * even
    assert 512 * shape.vocab <= largest["store"] <= 512 * even


def test_plan_is_chosen_by_the_workspace() -> None:
    """S where [T, V] in bf16 and one chunk's fp32 logits of two models fit, R beyond."""
    size = Size(4096, 151936, "cpu", models=3, kept=2, operand_bytes=2, statistic_bytes=4)
    needed = 151936 * (4096 * 2 + 128 * 2 * 4)
    for workspace, stored in ((needed, True), (needed - 1, False)):
        tiling = Tiling.choose(KernelSettings(workspace_bytes=workspace), size, wants_gradient=True)
        assert tiling.stored == stored
    assert not Tiling.choose(KernelSettings(plan="store"), size, wants_gradient=False).stored
    assert not Tiling.choose(KernelSettings(), size, wants_gradient=True).stored
    assert Tiling.choose(KernelSettings(), replace(size, tokens=1024), wants_gradient=True).stored


def test_teachers_logits_fit_the_workspace() -> None:
    size = Size(4096, 151936, "cpu", models=2, kept=2, operand_bytes=2, statistic_bytes=4)
    a_token = 151936 * 2 * 4
    for workspace, tokens in ((7 * a_token, 7), (7 * a_token - 1, 6), (1, 1), (None, 128)):
        assert Tiling.resident(KernelSettings(workspace_bytes=workspace), size).chunk_tokens == tokens
    assert Tiling.resident(KernelSettings(workspace_bytes=1, chunk_tokens=5), size).chunk_tokens == 5


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be 'adaptive' or 'constant', got 'adaptiv'"):
        Extrapolation(mode="adaptiv", alpha=1.0, epsilon=1e-3, tvd_scale=1.0)  # type: ignore[arg-type]
