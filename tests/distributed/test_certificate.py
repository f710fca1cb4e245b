"""The certificate over layouts, and that it notices what peers got wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.algorithms import ppo
from megatron_aligndistil.certificate import suite
from megatron_aligndistil.certificate.algorithms import ALGORITHM_CHECKS
from megatron_aligndistil.certificate.findings import Finding
from megatron_aligndistil.certificate.kernels import KERNELS
from megatron_aligndistil.certificate.suite import Request, certify
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.kernels import gradients, partials
from megatron_aligndistil.models import heads, lora
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import groups, setup
from megatron_aligndistil.parallel.setup import Layout
from tests.distributed.harness import run_ranks

SP2 = Layout(tensor=2, sequence_parallel=True)
# (processes, what is asked). All number types where that is quick: a rank has half a core in the tests.
LAYOUTS = {
    "tp1": (1, Request(Layout())),
    "tp2": (2, Request(Layout(tensor=2), precision="32")),
    "tp2-sp": (2, Request(SP2, precision="64")),
    "tp2-sp, a token a chunk, packed": (
        2,
        Request(
            SP2,
            1,
            packed=True,
            precision="32",
            kernel=KernelConfig(plan="recompute", chunk_tokens=1, backend="pytorch"),
        ),
    ),
    "tp4": (4, Request(Layout(tensor=4), precision="32")),
    "tp4-sp": (4, Request(Layout(tensor=4, sequence_parallel=True), precision="64")),
    "tp2-pp2-sp": (
        4,
        Request(replace(SP2, pipeline=2), precision="64", kernel=KernelConfig(plan="store", chunk_tokens=5)),
    ),
}


def _certified(request: Request) -> list[Finding]:
    setup.initialize(request.layout, seed=1)
    return certify(request)


# A minute or more each on two cores; test_layouts has algorithms, test_kernels_distributed kernels in these layouts.
SLOW = {"tp2", "tp2-sp, a token a chunk, packed", "tp4", "tp4-sp"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS])
def test_everything_passes(name: str) -> None:
    world, request = LAYOUTS[name]
    findings, *others = run_ranks(world, _certified, request, timeout_seconds=250)
    assert all(other == findings for other in others)
    assert {finding.name for finding in findings} == {*KERNELS, *ALGORITHM_CHECKS}
    for finding in findings:
        assert finding.passed, finding
        assert finding.peak_bytes > 0
        words = {**KERNELS, **ALGORITHM_CHECKS}[finding.name].words
        if request.layout.tensor == 1:
            assert finding.words_per_token == 0
        else:  # less than half a word more where sums are sent too
            assert words <= finding.words_per_token < words + 0.5


def test_what_a_request_asks_for() -> None:
    request = Request(Layout())
    assert request.dtypes == [torch.float64, torch.float32, torch.bfloat16]

    def chosen(kernels: Iterator[KernelConfig]) -> list[tuple[str, int | None]]:
        return [(kernel.plan, kernel.chunk_tokens) for kernel in kernels]

    every = [("store", 5), ("store", None), ("recompute", 5), ("recompute", None)]
    assert chosen(request.every_kernel()) == every
    assert chosen(request.forward_kernels()) == [("store", 5), ("store", None)]
    assert chosen(request.step_kernels()) == [("store", 5), ("recompute", None)]
    request = Request(
        Layout(), precision="32", kernel=KernelConfig(plan="recompute", chunk_tokens=3, backend="pytorch")
    )
    assert request.dtypes == [torch.float32]
    assert chosen(request.every_kernel()) == chosen(request.step_kernels()) == [("recompute", 3)]
    assert all(kernel.backend == "pytorch" for kernel in request.every_kernel())


def _summed_twice() -> None:
    """Peers' shipped bug: a plain all-reduce in autograd sums what the region operator has already summed."""
    region = heads.copy_to_tensor_model_parallel_region

    def again(hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * groups.tensor().size)
        return region(hidden)

    heads.copy_to_tensor_model_parallel_region = again


def _first_shard_alone() -> None:
    partials.MergedSoftmax.total = lambda self, weighted_NT: self.scale_NT[0] * weighted_NT[0]  # type: ignore[method-assign]


def _words_in_the_backward_pass() -> None:
    """A kernel that sums its own gradient over the ranks."""
    accumulate = gradients.Gradients.add_stored

    def and_send(self: gradients.Gradients, gradient_TV: Tensor) -> None:
        accumulate(self, gradient_TV)
        dist.all_reduce(torch.zeros(1))

    gradients.Gradients.add_stored = and_send  # type: ignore[method-assign]


def _not_whitened() -> None:
    ppo.whitened = lambda advantages: advantages


def _values_not_clipped() -> None:
    loss = ppo.value_loss
    ppo.value_loss = lambda value_T, old_T, return_T, clip: loss(value_T, old_T, return_T, math.inf)


def _scores_gradient_summed() -> None:
    """Every tensor rank has the score head's whole gradient; whoever adds theirs up has a multiple of it."""
    values = heads._scalar_values

    def summed(chunk: HiddenStateModel, hidden_SBH: Tensor) -> Tensor:
        weight_1H = chunk.score_head.weight
        if weight_1H.requires_grad and not getattr(weight_1H, "hooked", False):
            weight_1H.hooked = True
            weight_1H.register_hook(lambda gradient: gradient * groups.tensor().size)
        return values(chunk, hidden_SBH)

    heads._scalar_values = summed


def _adapters_gradient_not_summed() -> None:
    """Each tensor rank then has the gradient of A from its own rows of B alone."""
    lora.copy_to_tensor_model_parallel_region = lambda down_SBR: down_SBR


def _certified_with(mutation: Callable[[], None], names: set[str]) -> list[Finding]:
    mutation()
    suite.KERNELS = {name: check for name, check in KERNELS.items() if name in names}
    suite.ALGORITHM_CHECKS = {name: check for name, check in ALGORITHM_CHECKS.items() if name in names}
    kernel = KernelConfig(plan="store", chunk_tokens=5, backend="pytorch")
    return _certified(Request(Layout(tensor=2), precision="64", kernel=kernel))


@pytest.mark.parametrize(
    ("mutation", "complaint", "failing", "unharmed"),
    [
        (_summed_twice, "gradient error", {"sft", "dpo", "aligndistil"}, {"token_logprob"}),
        (_first_shard_alone, "value error", {"token_kl to_other"}, {"token_logprob"}),
        (_not_whitened, "value error", {"ppo"}, {"ppo critic", "rto"}),
        (_values_not_clipped, "gradient error", {"ppo critic", "rto critic"}, {"ppo"}),
        (_adapters_gradient_not_summed, "gradient error", {"sft lora", "aligndistil lora"}, {"sft"}),
        (_scores_gradient_summed, "gradient error", {"ppo critic", "reward_model"}, {"ppo"}),
        (
            _words_in_the_backward_pass,
            "words a token",
            {"token_kl to_other", "token_logprob"},
            {"teacher_scalars adaptive"},
        ),
    ],
)
def test_mutations_are_noticed(
    mutation: Callable[[], None], complaint: str, failing: set[str], unharmed: set[str]
) -> None:
    findings = run_ranks(2, _certified_with, mutation, failing | unharmed)[0]
    for finding in findings:  # far beyond the bound of 1e-10, or nothing at all
        error = max(finding.value_error, finding.gradient_error)
        assert error > 1e-3 or error < 1e-12 or "words" in complaint, finding
    assert {finding.name for finding in findings if finding.passed} == unharmed
    assert failing == {finding.name for finding in findings if complaint in " ".join(finding.complaints)}
