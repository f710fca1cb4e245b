"""What a call sent to other ranks and what it held in memory, seen at every operator of its two passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")

_COLLECTIVES = ("c10d", "_c10d_functional")


class Recorder(TorchDispatchMode):
    """Sees every operator of the forward and of the backward pass, PyTorch's collectives among them.

    collectives  (name, elements that this rank contributed), in order
    largest      elements of the largest floating-point tensor that an operator returned
    peak_bytes   the most bytes held together by tensors made inside. On a GPU the allocator's own maximum; on a CPU
                 counted by storage, from the operator that returns it until its last reference goes (an operator's
                 inner scratch space is not seen)
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.collectives: list[tuple[str, int]] = []
        self._live = self._peak = self._at_entry = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    @property
    def words(self) -> int:
        """Elements contributed to all collectives so far."""
        return sum(elements for _, elements in self.collectives)

    @property
    def peak_bytes(self) -> int:
        return self._peak

    def __enter__(self) -> Recorder:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._at_entry = torch.cuda.memory_allocated()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if torch.cuda.is_available():
            self._peak = torch.cuda.max_memory_allocated() - self._at_entry

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = list(_tensors(args))
        if kwargs:
            given += _tensors(tuple(kwargs.values()))
        for tensor in given:
            self._hold(tensor, made_inside=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._hold(tensor, made_inside=True)
            if tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        if func.namespace in _COLLECTIVES and not func.name().endswith("wait_tensor"):
            # An all-gather names its output too, which is larger than what the rank gives.
            elements = min((tensor.numel() for tensor in given), default=0)
            self.collectives.append((func.name().partition("::")[2], elements))
        return result

    def _hold(self, tensor: Tensor, made_inside: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # a storage's Python object lives as long as the storage
        if key in self._storages:
            return
        size = storage.nbytes() if made_inside else 0

        def released(_: Any) -> None:
            self._live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, released)
        self._live += size
        self._peak = max(self._peak, self._live)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those of an operator's arguments or results, which lie in tuples and lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def recorded(call: Callable[[], Result]) -> tuple[Result, Recorder]:
    """The call's result and what it did."""
    with Recorder() as recorder:
        result = call()
    return result, recorder
