"""The Triton sweeps without a GPU: run by Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.errors import UserError

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURES = [80, 90, 100]
REGISTERS, WARPS = 65536, 16  # of a multiprocessor; resident warps that keep enough loads in flight


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    result = run("-m", "tests.unit.kernels.triton_cases", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", ["moderate", "shifted", "steep"])
def test_errors_against_float64_are_those_of_plain_fp32(interpreted: dict[str, Any], kind: str) -> None:
    rows = [row for row in interpreted["errors"] if row["kind"] == kind]
    assert len(rows) == 5 * 12  # shapes, launchers
    for row in rows:
        assert row["errors"], row
        for error, naive in zip(row["errors"], row["naive"], strict=True):
            assert error <= naive + 1e-6, row
            assert error <= 2e-6, row


def test_bf16_gradients_are_fp32_ones_to_a_last_place(interpreted: dict[str, Any]) -> None:
    """Triton's interpreter truncates; that the compiled kernels round to nearest is read from their code below."""
    assert len(interpreted["bf16"]) == 3 * 5 * 4
    assert max(row["error"] for row in interpreted["bf16"]) <= 2**-7


def test_gradients_may_overwrite_any_logits_they_read(interpreted: dict[str, Any]) -> None:
    assert interpreted["in place differs"] == []


def test_no_column_gives_empty_sums_and_no_row_gives_none(interpreted: dict[str, Any]) -> None:
    for name, words in interpreted["no column"].items():
        maxima = {"total_variation": [], "token_kl_sums": [0, 3]}.get(name, [0])
        assert words == [["-inf" if k in maxima else "0.0"] * 3 for k in range(len(words))], name
    assert interpreted["no row"] == [[2, 0], [2, 0]]


def test_a_block_without_a_finite_logit_adds_nothing(interpreted: dict[str, Any]) -> None:
    assert interpreted["masked"] <= 1e-6


def test_refused_operands_are_named(interpreted: dict[str, Any]) -> None:
    for what, message in interpreted["refused"].items():
        assert what in message, (what, message)


def hardest(architecture: int) -> list[Any]:
    """Every sweep in the configuration with the most columns a thread, and so the most registers."""
    from megatron_aligndistil.kernels.triton_sweeps.compiled import configurations, measure, sweeps

    return [
        measure(sweep, max(configurations(sweep), key=lambda c: c.kwargs["BLOCK"] / c.num_warps), architecture)
        for sweep in sweeps()
    ]


def check(row: Any) -> None:
    assert row.spill_bytes == 0, row
    assert row.vector_bytes == 16, row
    assert REGISTERS // (row.registers * row.warps * 32) * row.warps >= WARPS, row
    assert row.nearest_bf16 == row.name.endswith("bf16"), row


@pytest.fixture(scope="module")
def compiled() -> list[Any]:
    return [row for architecture in ARCHITECTURES for row in hardest(architecture)]


def test_compiled_kernels_do_not_spill_and_load_16_bytes(compiled: list[Any], interpreted: dict[str, Any]) -> None:
    from megatron_aligndistil.kernels.triton_sweeps.compiled import table

    print(table(compiled))
    assert len(compiled) == 3 * (8 + 4 * 2)  # architectures; statistics, gradients in their types
    for row in compiled:
        check(row)
    assert {row.name for row in compiled} == set(interpreted["traffic"])


@pytest.mark.slow
def test_compiled_kernels_do_not_spill_in_any_configuration() -> None:
    from megatron_aligndistil.kernels.triton_sweeps.compiled import resources, table

    rows = [row for architecture in ARCHITECTURES for row in resources(architecture)]
    print(table(rows))
    assert len(rows) == 3 * (8 * 4 + 4 * 2)
    for row in rows:
        check(row)


def test_sweeps_move_no_more_than_the_least_bytes(compiled: list[Any], interpreted: dict[str, Any]) -> None:
    """Counted by the interpreter; the scalars of the 2 rows are all that comes on top."""
    least = {row.name: row.least_bytes for row in compiled}
    for name, moved in interpreted["traffic"].items():
        print(f"{name:32} {moved:8.3f} bytes a column, at least {least[name]}")
        assert least[name] <= moved <= least[name] * 1.01, name


def test_odd_row_strides_do_not_spill_either() -> None:
    from megatron_aligndistil.kernels.triton_sweeps.compiled import configurations, measure, sweeps

    rows = [measure(sweep, configurations(sweep)[0], 90, aligned=False) for sweep in sweeps()]
    assert {(row.spill_bytes, row.vector_bytes) for row in rows} == {(0, 4)}


def test_an_architecture_without_bf16_is_refused() -> None:
    from megatron_aligndistil.kernels.triton_sweeps.compiled import resources

    with pytest.raises(UserError, match="architecture 75"):
        resources(75)


def test_a_compiler_under_the_interpreter_says_what_to_do() -> None:
    program = "from megatron_aligndistil.kernels.triton_sweeps.compiled import resources; resources(90)"
    result = run("-c", program, TRITON_INTERPRET="1")
    assert f"{UserError.__name__}: Triton's environment: TRITON_INTERPRET=1" in result.stderr


def test_the_package_itself_does_not_import_triton() -> None:
    probe = "import sys, megatron_aligndistil.kernels.triton_sweeps; assert 'triton' not in sys.modules"
    result = run("-c", probe)
    assert result.returncode == 0, result.stderr
