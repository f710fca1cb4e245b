"""Records what operators make: the largest floating-point tensor, and every collective with its words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Sees every operator of the forward and of the backward pass, PyTorch's collectives among them.

    largest      elements of the largest floating-point tensor that an operator returned
    collectives  (name, elements that this rank contributed) in order
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.largest = max(self.largest, leaf.numel())
        if func.namespace == "c10d":
            elements = [leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.collectives.append((func.name().removeprefix("c10d::"), min(elements, default=0)))
        return result


def recorded(call: Callable[[], Any]) -> tuple[Any, Recorder]:
    """The call's result and what it did."""
    with Recorder() as recorder:
        result = call()
    return result, recorder
