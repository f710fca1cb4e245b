"""token_logprob on one rank against the dense float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_logprob import token_logprob, token_logprob_and_entropy
from megatron_aligndistil.kernels.token_logprob.reference import dense_token_logprob
from megatron_aligndistil.types import VocabHead
from tests.unit.kernels.problems import (
    GRADIENT_TOLERANCE,
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


def _labels(shape: Shape) -> torch.Tensor:
    labels_T = torch.arange(shape.tokens) * 7 % shape.vocab
    labels_T[0], labels_T[-1] = shape.vocab - 1, 0
    return labels_T


@pytest.mark.parametrize("settings", every_way(), ids=way_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_weighted_gradient_equal_the_reference(dtype: torch.dtype, settings: KernelSettings) -> None:
    if not takes(settings, dtype):
        pytest.skip("the compiled loops have no float64")
    shape = Shape()
    (model,) = models(shape, dtype, count=1)
    labels_T, weights_T = _labels(shape), upstream(shape.tokens, dtype)
    hidden_TH, head = model.leaf()
    dense = model.dense()
    logprob_T, entropy_T = token_logprob_and_entropy(hidden_TH, head, labels_T, settings)
    expected_T = dense_token_logprob(dense.hidden_TH, dense.weight_VH, labels_T, model.vocab_size)
    (weights_T * logprob_T).sum().backward()
    (weights_T.double() * expected_T).sum().backward()

    assert logprob_T.dtype == dtype
    assert relative_error(logprob_T.detach(), expected_T.detach()) <= GRADIENT_TOLERANCE[dtype] / 10
    assert torch.equal(logprob_T, token_logprob(hidden_TH, head, labels_T, settings))
    logprobs_TV = dense.logits_TV().detach().log_softmax(-1)
    assert relative_error(entropy_T, -(logprobs_TV.exp() * logprobs_TV).sum(-1)) <= GRADIENT_TOLERANCE[dtype]
    assert not entropy_T.requires_grad
    assert relative_error(hidden_TH.grad, dense.hidden_TH.grad) <= GRADIENT_TOLERANCE[dtype]
    expected_VH = true_rows(dense.weight_VH.grad, model.vocab_size)
    assert relative_error(true_rows(head.weight.grad, model.vocab_size), expected_VH) <= GRADIENT_TOLERANCE[dtype]
    assert not head.weight.grad[model.vocab_size :].any()


@pytest.mark.parametrize("settings", every_way((16,)), ids=way_id)
def test_bf16_inputs_give_fp32_statistics_better_than_bf16_logits(settings: KernelSettings) -> None:
    skip_without_bf16(settings.backend)
    shape = Shape(tokens=64, hidden=64, vocab=1000, padded=1024)
    (model,) = models(shape, torch.bfloat16, count=1)
    labels_T = _labels(shape)
    hidden_TH, head = model.leaf()
    dense = model.dense()
    logprob_T = token_logprob(hidden_TH, head, labels_T, settings)
    expected_T = dense_token_logprob(dense.hidden_TH, dense.weight_VH, labels_T, model.vocab_size)
    logprob_T.sum().backward()
    expected_T.sum().backward()

    assert logprob_T.dtype == torch.float32
    assert (logprob_T.double() - expected_T).abs().max() <= 2e-5  # fp32's: the inputs' rounding is in the reference too
    bf16_logits_TV = hidden_TH.detach() @ head.weight.detach()[: model.vocab_size].t()
    naive_T = bf16_logits_TV.float().log_softmax(-1).gather(1, labels_T[:, None]).squeeze(1)
    assert (naive_T.double() - expected_T).abs().max() > 1e-2  # what rounding the logits would have cost
    assert hidden_TH.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    for actual, expected in ((hidden_TH.grad, dense.hidden_TH.grad), (head.weight.grad, dense.weight_VH.grad)):
        rows = min(actual.shape[0], model.vocab_size)
        assert relative_error(actual[:rows], expected[:rows]) <= 2**-8  # rounded to bf16 once


@pytest.mark.parametrize("settings", every_way((4,)), ids=way_id)
def test_no_token_gives_zero_gradients(settings: KernelSettings) -> None:
    (model,) = models(Shape(tokens=0), torch.float32, count=1)
    hidden_TH, head = model.leaf()
    logprob_T = token_logprob(hidden_TH, head, torch.empty(0, dtype=torch.int64), settings)
    logprob_T.sum().backward()
    assert logprob_T.shape == (0,)
    assert hidden_TH.grad.shape == (0, 24)
    assert head.weight.grad.shape == (64, 24)
    assert not head.weight.grad.any()


@pytest.mark.parametrize("settings", every_way((4,)), ids=way_id)
def test_frozen_head_gets_no_gradient(settings: KernelSettings) -> None:
    (model,) = models(Shape(), torch.float32, count=1)
    hidden_TH, head = model.leaf()
    head.weight.requires_grad_(False)
    token_logprob(hidden_TH, head, _labels(Shape()), settings).sum().backward()
    assert head.weight.grad is None
    assert hidden_TH.grad.any()


def test_wrong_inputs_are_refused() -> None:
    (model,) = models(Shape(), torch.float32, count=1)
    hidden_TH, head = model.leaf()
    labels_T = _labels(Shape())
    with pytest.raises(ValueError, match=r"labels must be in \[0, 53\), got -1 to"):
        token_logprob(hidden_TH, head, labels_T - 1, KernelSettings())
    with pytest.raises(ValueError, match=r"labels must be in \[0, 53\), got 1 to 53"):
        token_logprob(hidden_TH, head, labels_T + 1, KernelSettings())
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        token_logprob(hidden_TH, head, labels_T, KernelSettings(chunk_tokens=0))
    with pytest.raises(ValueError, match=r"hidden states \[13, 24\] don't fit a head \[V, H\] of \[64, 8\]"):
        token_logprob(hidden_TH, VocabHead(torch.zeros(64, 8), 53), labels_T, KernelSettings())
    with pytest.raises(ValueError, match=r"labels \[12\] for 13 tokens"):
        token_logprob(hidden_TH, head, labels_T[1:], KernelSettings())


def test_temperature_divides_the_logits_and_so_the_gradient() -> None:
    (model,) = models(Shape(), torch.float64, count=1)
    labels_T = _labels(Shape())
    for settings in (KernelSettings(plan="store"), KernelSettings(plan="recompute")):
        hidden_TH, head = model.leaf()
        token_logprob(hidden_TH, replace(head, temperature=0.7), labels_T, settings).sum().backward()
        dense = model.dense()
        logprobs_TV = (dense.logits_TV() / 0.7).log_softmax(-1)
        logprobs_TV.gather(1, labels_T[:, None]).sum().backward()
        assert relative_error(hidden_TH.grad, dense.hidden_TH.grad) <= 1e-12
        assert relative_error(head.weight.grad[:53], dense.weight_VH.grad[:53]) <= 1e-12
