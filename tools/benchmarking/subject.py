"""One implementation bound to one problem, in the process that runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarking import meter
from benchmarking.implementations import Implementation
from benchmarking.problem import Problem
from benchmarking.products import Products, Variant, fastest


@dataclass(frozen=True)
class Reply:
    """What a call came to; fields that don't apply are None.

    The loss and the norms of its gradients are of all ranks together: who computes another loss shows.
    """

    seconds: float | None = None
    extra_bytes: int | None = None
    loss: float | None = None
    hidden_gradient_norm: float | None = None
    weight_gradient_norm: float | None = None
    variant: str | None = None
    trials: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class Subject:
    """Holds nothing between calls but the problem, which other processes share."""

    def __init__(self, implementation: Implementation, problem: Problem) -> None:
        self.implementation, self.problem = implementation, problem
        self.device = problem.policy.hidden_TH.device
        self.variant: Variant | None = None

    def warm_up(self) -> Reply:
        """The first call: it compiles, tries the yardstick's variants, and tells the loss and its gradients."""
        if self.implementation.loss is None:
            self.variant, trials = fastest(self.problem)
            Products(self.problem, self.variant).run()
            return Reply(variant=str(self.variant), trials=trials)
        call = _Call(self.implementation, self.problem)
        loss = call.run()
        return replace(_norms(call.problem), loss=float(loss))

    def time(self) -> Reply:
        """One timed call."""
        call = self._call()
        if self.problem.group is not None:
            dist.barrier(self.problem.group)
        return Reply(seconds=meter.seconds(call.run, self.device))

    def memory(self) -> Reply:
        """One call's peak. The tensors that gradients are added to are a trainer's, and there before."""
        meter.return_freed_memory()
        if self.implementation.compiled:
            self.warm_up()
        elif self.implementation.loss is not None:
            _Call(self.implementation, self.problem.corner()).run()
        _start_threads(self.device)
        call = self._call()
        if isinstance(call, _Call):
            call.own_gradients()
        return Reply(extra_bytes=meter.peak(call.run, self.device).extra)

    def _call(self) -> _Call | Products:
        if self.implementation.loss is None:
            tokens = self.problem.policy.hidden_TH.shape[0]
            return Products(self.problem, self.variant or Variant(self.problem.policy.weight_VH.dtype, tokens))
        return _Call(self.implementation, self.problem)


class _Call:
    """Fresh leaves without gradients, prepared; ``run`` is what is measured."""

    def __init__(self, implementation: Implementation, problem: Problem) -> None:
        assert implementation.loss is not None
        self.problem = replace(problem, policy=problem.policy.leaf())
        self.loss = implementation.loss(self.problem)

    def run(self) -> Tensor:
        """Loss and gradients; returns the loss."""
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def own_gradients(self) -> None:
        """Give the leaves gradients to add to, but for a head with a ``main_grad``; their pages are written."""
        hidden_TH, weight_VH = self.problem.policy.hidden_TH, self.problem.policy.weight_VH
        for leaf in [hidden_TH] if hasattr(weight_VH, "main_grad") else [hidden_TH, weight_VH]:
            leaf.grad = torch.empty_like(leaf, requires_grad=False).zero_()


def _start_threads(device: torch.device) -> None:
    """What the libraries take once a process is not an implementation's. Large enough for all threads."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(256, 256, dtype=dtype, device=device, requires_grad=True)
        (x @ x).log_softmax(-1, dtype=torch.float32).exp().sum().backward()


def _norms(problem: Problem) -> Reply:
    """Norms of the gradients of the hidden states (summed over the shards) and of the head."""
    hidden_TH, weight_VH = problem.policy.hidden_TH, problem.policy.weight_VH
    gradient_VH = getattr(weight_VH, "main_grad", weight_VH.grad)
    assert hidden_TH.grad is not None and gradient_VH is not None
    hidden_gradient_TH = hidden_TH.grad.float()
    squared = gradient_VH.norm(dtype=torch.float32).square()
    if problem.group is not None:
        dist.all_reduce(hidden_gradient_TH, group=problem.group)
        dist.all_reduce(squared, group=problem.group)
    return Reply(hidden_gradient_norm=float(hidden_gradient_TH.norm()), weight_gradient_norm=math.sqrt(float(squared)))
