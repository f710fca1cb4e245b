"""The CPU runtime: Megatron-Core addresses a CUDA device throughout; where there is none, its calls land on the CPU.

One file, idempotent, active only after ``install()`` and only where CUDA is absent. Streams and events become inert
*classes* (annotations such as ``torch.cuda.Stream | None`` need classes), the CUDA random generator becomes the CPU's,
and ``device="cuda"`` becomes ``device="cpu"`` in every torch call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class InertStream:
    """Stands for ``torch.cuda.Stream``: CPU work is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> InertEvent:
        return InertEvent()

    def synchronize(self) -> None:
        pass


class InertEvent:
    """Stands for ``torch.cuda.Event``."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _names_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of every torch call."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if function is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(result, str):
            # The optimizer tells weight types apart by their CUDA names.
            return result.replace("torch.", "torch.cuda.", 1) if not result.startswith("torch.cuda.") else result
        return result


@contextlib.contextmanager
def _inert_context(*args: object, **kwargs: object) -> Iterator[None]:
    yield


def _inert_function() -> Callable[..., None]:
    # One object a name: torch's compiler refuses two names for one function.
    return lambda *args, **kwargs: None


def install() -> None:
    """Let Megatron-Core run on the CPU. Does nothing where CUDA is present, or the second time."""
    cuda: Any = torch.cuda
    if cuda.Stream is InertStream or torch.cuda.is_available():
        return
    cuda.current_device = lambda: CPU
    cuda.Stream, cuda.Event = InertStream, InertEvent
    cuda.stream = _inert_context
    cuda.current_stream = lambda *args, **kwargs: InertStream()
    cuda.default_stream = lambda *args, **kwargs: InertStream()
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "set_stream"):
        setattr(cuda, name, _inert_function())
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    from megatron.core import jit
    from megatron.core.tensor_parallel import random as mcore_random

    jit.disable_jit_fuser()
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _CudaMeansCpu().__enter__()
