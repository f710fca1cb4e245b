"""Which backend takes a call, and what happens where the compiled loops can't be had."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.kernels.backends import build
from megatron_aligndistil.kernels.backends.choice import PYTORCH, choose
from megatron_aligndistil.kernels.backends.native import NativeBackend
from megatron_aligndistil.kernels.settings import KernelSettings

EVEN, ODD = (4, 6), (4, 7)


@pytest.mark.parametrize(
    ("dtype", "shape", "compiled"),
    [
        (torch.float32, EVEN, True),
        (torch.float32, ODD, True),
        (torch.bfloat16, EVEN, True),
        (torch.bfloat16, ODD, False),
        (torch.float16, EVEN, False),
        (torch.float64, EVEN, False),
    ],
)
def test_compiled_loops_take_fp32_and_even_bf16(dtype: torch.dtype, shape: tuple[int, int], compiled: bool) -> None:
    if not build.native_takes(torch.bfloat16):
        pytest.skip("no C++ compiler, or a processor without bf16 products")
    backend = choose(KernelSettings(), (torch.zeros(shape, dtype=dtype),))
    assert isinstance(backend, NativeBackend) if compiled else backend is PYTORCH


def test_mixed_types_go_to_pytorch() -> None:
    operands = torch.zeros(EVEN), torch.zeros(EVEN, dtype=torch.bfloat16)
    assert choose(KernelSettings(), operands) is PYTORCH


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_backend_that_cannot_take_the_call_is_refused(backend: str) -> None:
    settings = KernelSettings(backend=backend)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=f"model.kernel.backend={backend}: can't be had here for torch.float64 on cpu"
    ):
        choose(settings, (torch.zeros(EVEN, dtype=torch.float64),))


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder of its own, and no memory of an earlier build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.native_operators.cache_clear()
    yield tmp_path
    build.native_operators.cache_clear()


def test_a_failing_compiler_is_one_log_line(
    rebuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "false")
    with caplog.at_level(logging.WARNING):
        assert build.native_operators() is None
    (record,) = caplog.records
    assert "PyTorch's operators, since the compiled ones failed" in record.getMessage()
    assert not list(rebuilt.rglob("*.so"))


def test_no_compiler_is_one_log_line(
    rebuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(rebuilt))
    with caplog.at_level(logging.INFO):
        assert build.native_operators() is None
    (record,) = caplog.records
    assert record.getMessage() == "kernels: PyTorch's operators (no C++ compiler was found for the compiled ones)"
