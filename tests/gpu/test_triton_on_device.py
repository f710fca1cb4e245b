"""The Triton sweeps on a GPU, as tuned there, against float64: a real vocabulary and an odd one."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from tests.unit.kernels import triton_cases as cases

pytestmark = pytest.mark.gpu

# Rows and columns: a real vocabulary; an odd one, whose rows begin at any 4 bytes; and enough rows to be tuned apart.
SHAPES = [(24, 151936), (9, 50257), (600, 1031)]


def problem(shape: tuple[int, int], kind: str) -> cases.Problem:
    return cases.problem(*shape, kind, device="cuda", padding=0)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_against_float64_are_those_of_plain_fp32(shape: tuple[int, int], kind: str) -> None:
    rows = list(cases.compare(problem(shape, kind)))
    assert len(rows) == 12
    for row in rows:
        for error, naive in zip(row["errors"], row["naive"], strict=True):
            assert error <= naive + 1e-6, row


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_gradients_are_rounded_to_nearest(shape: tuple[int, int]) -> None:
    case = problem(shape, "moderate")
    full, half = cases.gradients(case, torch.float32), cases.gradients(case, torch.bfloat16)
    for name, gradient_CV in full.items():
        assert cases.bf16_error(half[name], gradient_CV) <= 2**-8, name


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_may_overwrite_any_logits_they_read(shape: tuple[int, int]) -> None:
    case = problem(shape, "moderate")
    full = cases.gradients(case, torch.float32)
    for name, which, result_CV in cases.in_place(case):
        assert torch.equal(result_CV, full[name]), f"{name} over logits {which}"


def test_a_sweep_allocates_its_words_only() -> None:
    case = problem(SHAPES[0], "moderate")
    scalars = cases.row_scalars(case)
    arguments = case.logits, (scalars["log_z_d"], scalars["log_z_r"], case.alpha_C)
    cases.extrapolation.extrapolated_sums(*arguments)  # tunes
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    words_KC = cases.extrapolation.extrapolated_sums(*arguments)
    assert words_KC.shape == (4, SHAPES[0][0])
    assert torch.cuda.max_memory_allocated() - before <= 512  # the allocator's smallest block


def test_the_same_sums_to_the_bit_when_run_again() -> None:
    case = problem(SHAPES[0], "moderate")
    for name, launch in cases.STATISTICS.items():
        assert torch.equal(launch(case), launch(case)), name
