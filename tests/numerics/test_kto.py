"""KTO's KL and gradient are those of the global batch: no micro-batch size, packing or layout changes them."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from megatron_aligndistil.certificate.algorithms import ALGORITHM_CHECKS
from megatron_aligndistil.certificate.models import World, architecture_for
from megatron_aligndistil.certificate.sharded import Answer, Case, ShardedWorld
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.parallel import setup
from megatron_aligndistil.parallel.setup import Layout
from tests.distributed.harness import run_ranks

CHECKS = ("kto", "kto exchanged")
SP2, PP2 = Layout(tensor=2, sequence_parallel=True), Layout(pipeline=2)
INTERLEAVED = replace(PP2, virtual_pipeline=2)
ALONE = [Case(micro_batch_size=size) for size in (1, 2, 4)] + [Case(packed=True)]
CASES = [
    *ALONE,
    *(Case(world=2, micro_batch_size=size) for size in (1, 2, 4)),
    Case(SP2, world=2, packed=True),
    Case(PP2, world=2, micro_batch_size=2),
    Case(INTERLEAVED, world=2),
]


def _answers(work: list[tuple[str, Case]]) -> list[Answer]:
    setup.initialize(work[0][1].layout, seed=1)
    sharded = functools.cache(ShardedWorld.of)
    return [sharded(case).step(ALGORITHM_CHECKS[name], KernelConfig(chunk_tokens=7)) for name, case in work]


@functools.cache
def _of_layout(world: int, layout: Layout) -> dict[tuple[str, Case], Answer]:
    cases = [case for case in CASES if (case.world, case.layout) == (world, layout)]
    work = [(name, case) for case in cases for name in CHECKS]
    return dict(zip(work, run_ranks(world, _answers, work)[0], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_value_and_gradient_are_the_dense_ones(name: str, case: Case) -> None:
    answer = _of_layout(case.world, case.layout)[name, case]
    measured = answer.against(ALGORITHM_CHECKS[name].reference(World(architecture_for(case.layout, case.tied))))
    print(f"{name} {case}: value {measured.value_error:.1e}, gradient {measured.gradient_error:.1e}")
    assert measured.value_error <= 1e-10
    assert measured.gradient_error <= 1e-10


@pytest.mark.parametrize("name", CHECKS)
def test_micro_batches_and_replicas_change_neither_kl_nor_gradient(name: str) -> None:
    one, *others = (_of_layout(case.world, case.layout)[name, case] for case in CASES if case.layout == Layout())
    assert len(others) == 6
    for other in others:
        for metric in ("kl_estimate", "z0", "desirable_reward", "undesirable_reward"):
            assert other.metrics[metric] == pytest.approx(one.metrics[metric], rel=1e-12, abs=1e-15)
        for weight, gradient in one.gradients.items():
            torch.testing.assert_close(other.gradients[weight], gradient, rtol=1e-9, atol=1e-13)


def test_one_of_the_checks_has_a_kl_above_zero_and_the_other_one_cut_at_it() -> None:
    kls = [_of_layout(1, Layout())[name, ALONE[0]].metrics for name in CHECKS]
    assert math.isclose(kls[0]["kl_estimate"], -kls[1]["kl_estimate"], rel_tol=1e-9)
    assert sorted(metrics["z0"] > 0 for metrics in kls) == [False, True]
    assert abs(kls[0]["kl_estimate"]) > 0.1
