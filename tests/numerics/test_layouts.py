"""Value and gradient of every algorithm equal a dense float64 reference, whatever the layout and the batching.

The certificate runs a user's layout in every plan and chunk size; here are the layouts and ways of batching.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from megatron_aligndistil.certificate.algorithm_check import Reference
from megatron_aligndistil.certificate.algorithms import ALGORITHM_CHECKS
from megatron_aligndistil.certificate.models import World, architecture_for
from megatron_aligndistil.certificate.sharded import Answer, Case, ShardedWorld
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.parallel import setup
from megatron_aligndistil.parallel.setup import Layout
from tests.distributed.harness import run_ranks

SP2, SP4 = Layout(tensor=2, sequence_parallel=True), Layout(tensor=4, sequence_parallel=True)
TP2_PP2 = Layout(tensor=2, pipeline=2)
FP32 = torch.float32

CASES = [
    Case(micro_batch_size=4),
    Case(packed=True),
    Case(Layout(tensor=2), world=2),
    Case(SP2, world=2, micro_batch_size=2),
    Case(SP2, world=2, packed=True),
    Case(Layout(pipeline=2), world=2, micro_batch_size=2),
    Case(Layout(pipeline=2), world=2, packed=True),
    Case(Layout(pipeline=2, virtual_pipeline=2), world=2),
    Case(world=2, distributed_optimizer=True),
    Case(Layout(tensor=4), world=4),
    Case(SP4, world=4, micro_batch_size=4),
    Case(TP2_PP2, world=4),
    Case(replace(TP2_PP2, sequence_parallel=True), world=4, packed=True),
    Case(Layout(tensor=2), world=4, micro_batch_size=2),
    Case(Layout(pipeline=2), world=4, packed=True),
    Case(Layout(tensor=2), world=2, recompute="full"),
    Case(micro_batch_size=2, recompute="selective"),
    Case(Layout(context=2), world=2, micro_batch_size=2),
    Case(replace(SP2, context=2), world=4),
    Case(Layout(context=2, pipeline=2), world=4),
]
FP32_CASES = [
    Case(dtype=FP32, micro_batch_size=4),
    Case(replace(TP2_PP2, sequence_parallel=True), world=4, dtype=FP32),
    Case(Layout(tensor=4), world=4, packed=True, dtype=FP32),
    Case(Layout(pipeline=2), world=4, micro_batch_size=2, dtype=FP32),
]
EVERY_LAYOUT = [(name, case) for case in CASES for name in ("sft", "dpo", "aligndistil")]
# Scalar heads, and experience that is made in the layout: what the three above don't go through.
SCALARS_AND_EXPERIENCE = [
    (name, case)
    for case in (CASES[2], CASES[3], CASES[5], CASES[7], CASES[13], CASES[17])
    for name in ("reward_model", "ppo", "ppo critic", "token_pg")
]
# Adapters have collectives of their own in every layer.
ADAPTERS = [("aligndistil lora", case) for case in (CASES[3], CASES[7], CASES[8], CASES[15], CASES[17])]
# The others go through every step of training once in one process, and once sharded and packed.
EVERY_MODE = [
    (name, case) for case in (CASES[0], CASES[12]) for name in ALGORITHM_CHECKS if (name, case) not in EVERY_LAYOUT
]
IN_FLOAT64 = EVERY_LAYOUT + SCALARS_AND_EXPERIENCE + ADAPTERS + EVERY_MODE
IN_FLOAT32 = [(name, case) for case in FP32_CASES for name in ("sft", "dpo", "aligndistil", "aligndistil vanilla")]
IN_FLOAT32 += [(name, FP32_CASES[1]) for name in ("ppo", "ppo critic", "rto", "reward_model", "token_pg")]
TIED = [True, False]


def _answers(work: list[tuple[str, Case]]) -> list[Answer]:
    """Runs on every rank; the cases share a layout, and those that are equal their models."""
    setup.initialize(work[0][1].layout, seed=1)
    sharded = functools.cache(ShardedWorld.of)
    return [sharded(case).step(ALGORITHM_CHECKS[name], KernelConfig(chunk_tokens=7)) for name, case in work]


@functools.cache
def _reference(name: str, architecture: Architecture) -> Reference:
    return ALGORITHM_CHECKS[name].reference(World(architecture))


@functools.cache
def _layout_answers(world: int, layout: Layout) -> dict[tuple[str, Case], Answer]:
    """All answers of a layout, computed in one start of its ranks."""
    work = [
        (name, replace(case, tied=tied))
        for name, case in IN_FLOAT64 + IN_FLOAT32
        for tied in TIED
        if (case.world, case.layout) == (world, layout)
    ]
    work.sort(key=lambda pair: repr(pair[1]))
    return dict(zip(work, run_ranks(world, _answers, work)[0], strict=True))


def _relative_errors(name: str, case: Case) -> tuple[float, float]:
    answer = _layout_answers(case.world, case.layout)[name, case]
    measured = answer.against(_reference(name, architecture_for(case.layout, case.tied)))
    print(f"{name} {case}: value {measured.value_error:.1e}, gradient {measured.gradient_error:.1e}")
    return measured.value_error, measured.gradient_error


def _ids(pair: tuple[str, Case]) -> str:
    return f"{pair[0].replace(' ', '_')}-{pair[1]}"


@pytest.mark.parametrize("tied", TIED, ids=["tied", "untied"])
@pytest.mark.parametrize("pair", IN_FLOAT64, ids=_ids)
def test_float64_matches_the_dense_reference(pair: tuple[str, Case], tied: bool) -> None:
    value_error, gradient_error = _relative_errors(pair[0], replace(pair[1], tied=tied))
    assert value_error <= 1e-10
    assert gradient_error <= 1e-10


@pytest.mark.parametrize("tied", TIED, ids=["tied", "untied"])
@pytest.mark.parametrize("pair", IN_FLOAT32, ids=_ids)
def test_float32_is_within_1e_5_of_the_dense_reference(pair: tuple[str, Case], tied: bool) -> None:
    value_error, gradient_error = _relative_errors(pair[0], replace(pair[1], tied=tied))
    assert value_error <= 1e-5
    assert gradient_error <= 1e-5


def _student_as_its_teacher() -> Answer:
    layout = TP2_PP2
    setup.initialize(layout, seed=1)
    check = ALGORITHM_CHECKS["aligndistil"]
    # π_d = π_r leaves z* = z_d, so the student that is π_d as well is at the optimum.
    same = {key: "policy" for key in check.settings if key.endswith("_path")}
    check = replace(check, settings={**check.settings, **same})
    return ShardedWorld.of(Case(layout, world=4)).step(check, KernelConfig(chunk_tokens=7))


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    answer = run_ranks(4, _student_as_its_teacher)[0]
    assert abs(answer.metrics["loss"]) <= 1e-12
    assert max(float(tensor.abs().max()) for tensor in answer.gradients.values()) <= 1e-12
    assert answer.metrics["beta_max"] == pytest.approx(0.1 / 1e-2)
