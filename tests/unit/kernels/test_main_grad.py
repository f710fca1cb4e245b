"""The head's gradient under mcore's DDP: its real backward hook, untied and tied, several micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import embedding

from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_logprob import token_logprob
from megatron_aligndistil.kernels.token_logprob.reference import dense_token_logprob
from megatron_aligndistil.types import VocabHead
from tests.unit.kernels.problems import relative_error

VOCAB, PADDED, HIDDEN, TOKENS, MICRO_BATCHES = 53, 64, 24, 13, 3


class DDPParameter:
    """A parameter as mcore's DDP prepares it, with its own hook on the gradient accumulator."""

    def __init__(self, weight: Parameter, main_grad_dtype: torch.dtype) -> None:
        weight.main_grad = torch.zeros_like(weight, dtype=main_grad_dtype)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        self.hooks_run = 0
        ddp: Any = SimpleNamespace(
            param_to_bucket_group={weight: None},
            ddp_config=SimpleNamespace(overlap_grad_reduce=False),
        )
        self.accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
        self.accumulator.register_hook(DistributedDataParallel._make_backward_post_hook(ddp, weight))
        self.accumulator.register_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.hooks_run += 1


def _weight(dtype: torch.dtype) -> Parameter:
    generator = torch.Generator().manual_seed(0)
    return Parameter((0.5 * torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)).to(dtype))


def _loss(weight: Tensor, head_dtype: torch.dtype, micro_batch: int, tied: bool = False) -> Tensor:
    """Summed log-probs of a micro-batch: by the kernel, or densely where ``weight`` is float64."""
    tokens_T = (torch.arange(TOKENS) * (5 + micro_batch)) % VOCAB
    labels_T = (torch.arange(TOKENS) * 3 + micro_batch) % VOCAB
    generator = torch.Generator().manual_seed(1 + micro_batch)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(head_dtype).to(weight.dtype)
    if tied:
        hidden_TH = hidden_TH + embedding(tokens_T, weight)
    if weight.dtype == torch.float64:
        return dense_token_logprob(hidden_TH, weight, labels_T, VOCAB).sum()
    return token_logprob(hidden_TH, VocabHead(weight, VOCAB), labels_T, KernelSettings(chunk_tokens=4)).sum()


@pytest.mark.parametrize("zero_out_wgrad", [False, True])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("main_grad_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_part_of_the_gradient_arrives_once(
    tied: bool, zero_out_wgrad: bool, main_grad_dtype: torch.dtype
) -> None:
    """Whatever mcore decided about ``zero_out_wgrad``, and for buffers of a type that the kernel doesn't add into."""
    weight = _weight(torch.float32)
    ddp = DDPParameter(weight, main_grad_dtype)
    if zero_out_wgrad:
        weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    dense = weight.detach().double().requires_grad_()
    for micro_batch in range(MICRO_BATCHES):
        _loss(weight, torch.float32, micro_batch, tied).backward()
        _loss(dense, torch.float32, micro_batch, tied).backward()
    tolerance = 2**-7 if main_grad_dtype == torch.bfloat16 else 1e-6
    assert relative_error(weight.main_grad, dense.grad) <= tolerance  # type: ignore[attr-defined]
    assert weight.grad is None
    assert ddp.hooks_run == MICRO_BATCHES


def test_bf16_head_accumulates_without_rounding_to_bf16() -> None:
    """The micro-batches' gradients, each alone in fp32, add up in fp32."""
    weight = _weight(torch.bfloat16)
    DDPParameter(weight, torch.float32)
    total_VH = torch.zeros(PADDED, HIDDEN, dtype=torch.float64)
    for micro_batch in range(MICRO_BATCHES):
        _loss(weight, torch.bfloat16, micro_batch).backward()
        alone = _weight(torch.bfloat16)
        DDPParameter(alone, torch.float32)
        _loss(alone, torch.bfloat16, micro_batch).backward()
        total_VH += alone.main_grad  # type: ignore[attr-defined]
    assert relative_error(weight.main_grad, total_VH) <= 1e-6  # type: ignore[attr-defined]
    assert relative_error(weight.main_grad.bfloat16(), total_VH) > 1e-4  # type: ignore[attr-defined]
