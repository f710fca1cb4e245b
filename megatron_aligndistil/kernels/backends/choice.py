"""Which backend a call runs on."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.kernels.backends.backend import Backend
from megatron_aligndistil.kernels.backends.build import native_operators, native_takes
from megatron_aligndistil.kernels.backends.native import NativeBackend
from megatron_aligndistil.kernels.backends.pytorch import PyTorchBackend
from megatron_aligndistil.kernels.settings import KernelSettings

PYTORCH = PyTorchBackend()


def choose(settings: KernelSettings, operands: tuple[Tensor, ...]) -> Backend:
    """The backend for these hidden states and weights; PyTorch where none of the others takes them.

    Raises ConfigError where the settings ask for one that can't be had.
    """
    device = operands[0].device.type
    wanted = settings.backend
    if wanted == "auto":
        wanted = "triton" if device == "cuda" else "native"
        if not _takes(wanted, operands):
            wanted = "pytorch"
    if wanted == "pytorch":
        return PYTORCH
    if not _takes(wanted, operands):
        shapes = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in operands)
        raise ConfigError(f"model.kernel.backend={wanted}: can't be had here for {shapes}; use auto or pytorch")
    return _native() if wanted == "native" else _triton()


def _takes(name: str, operands: tuple[Tensor, ...]) -> bool:
    dtypes, on_gpu = {tensor.dtype for tensor in operands}, operands[0].is_cuda
    if name == "triton":
        return on_gpu and torch.float64 not in dtypes and find_spec("triton") is not None
    if on_gpu or len(dtypes) > 1 or any(tensor.stride(1) != 1 for tensor in operands):
        return False
    dtype = operands[0].dtype
    # Two bf16 hidden units are one word of the compiled products.
    even = dtype != torch.bfloat16 or all(tensor.shape[1] % 2 == 0 for tensor in operands)
    return even and native_takes(dtype)


@cache
def _native() -> Backend:
    operators = native_operators()
    assert operators is not None
    return NativeBackend(operators)


@cache
def _triton() -> Backend:
    from megatron_aligndistil.kernels.backends.triton import TritonBackend

    return TritonBackend()
