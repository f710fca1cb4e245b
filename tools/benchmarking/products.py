"""The yardstick: the five head products that the loss and its gradients consist of, and nothing else.

z_p, z_d, z_r [T, V], then dH = g W [T, H] and dW = gᵀ H [V, H], into buffers that exist beforehand. The fastest
straightforward way is looked for: operands in the models' type and in float32 (many CPUs multiply float32 faster, and
converting is not timed), all tokens at once and chunks of some.

Shapes: T tokens, C tokens of a chunk, H hidden size, V vocabulary entries (of the shard).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarking.problem import Model, Problem

CHUNKS = (256, 512, 1024, 2048)
# Candidates are tried on a part of the vocabulary, whose logits still don't fit in a cache.
TRIAL_VOCABULARY_SHARE = 4


@dataclass(frozen=True)
class Variant:
    """A way to do it. ``dtype`` is of operands and results."""

    dtype: torch.dtype
    chunk_tokens: int

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, {self.chunk_tokens} tokens a chunk"


class Products:
    """The five products of a problem in one way. ``run`` does them."""

    def __init__(self, problem: Problem, variant: Variant) -> None:
        models = (problem.policy, problem.d, problem.r)
        self.variant = variant
        self.models = [Model(*(x.detach().to(variant.dtype) for x in vars(model).values())) for model in models]
        hidden_TH, weight_VH = self.models[0].hidden_TH, self.models[0].weight_VH
        self.chunk = min(variant.chunk_tokens, hidden_TH.shape[0])
        self.logits_CV = torch.zeros(self.chunk, weight_VH.shape[0], dtype=variant.dtype, device=weight_VH.device)
        self.gradient_CV = torch.full_like(self.logits_CV, 1e-3)
        self.hidden_gradient_TH = torch.zeros_like(hidden_TH)
        self.weight_gradient_VH = torch.zeros_like(weight_VH)

    def run(self) -> None:
        """Every chunk's five products."""
        policy = self.models[0]
        tokens = policy.hidden_TH.shape[0]
        for start in range(0, tokens, self.chunk):
            rows = slice(start, min(start + self.chunk, tokens))
            size = rows.stop - rows.start
            for model in self.models:
                torch.mm(model.hidden_TH[rows], model.weight_VH.t(), out=self.logits_CV[:size])
            gradient_CV = self.gradient_CV[:size]
            torch.mm(gradient_CV, policy.weight_VH, out=self.hidden_gradient_TH[rows])
            if size == tokens:
                torch.mm(gradient_CV.t(), policy.hidden_TH, out=self.weight_gradient_VH)
            else:
                self.weight_gradient_VH.addmm_(gradient_CV.t(), policy.hidden_TH[rows])


def variants(problem: Problem) -> list[Variant]:
    """The ways to try."""
    tokens, own = problem.policy.hidden_TH.shape[0], problem.policy.weight_VH.dtype
    sizes = [size for size in CHUNKS if size < tokens] + [tokens]
    dtypes = {own: None, torch.float32: None} if problem.policy.weight_VH.device.type == "cpu" else {own: None}
    return [Variant(dtype, size) for dtype in dtypes for size in sizes]


def fastest(problem: Problem) -> tuple[Variant, dict[str, float]]:
    """The fastest way on a part of the vocabulary, and the seconds that each took there."""
    entries = -(-problem.policy.weight_VH.shape[0] // TRIAL_VOCABULARY_SHARE)
    policy, d, r = (Model(m.hidden_TH, m.weight_VH[:entries]) for m in (problem.policy, problem.d, problem.r))
    part = replace(problem, policy=policy, d=d, r=r)
    seconds = {variant: _time(Products(part, variant)) for variant in variants(problem)}
    best = min(seconds, key=lambda variant: seconds[variant])
    return best, {str(variant): taken for variant, taken in seconds.items()}


def _time(products: Products) -> float:
    taken = []
    for _ in range(2):  # the first one warms up
        synchronize(products.logits_CV)
        start = time.perf_counter()
        products.run()
        synchronize(products.logits_CV)
        taken.append(time.perf_counter() - start)
    return taken[-1]


def synchronize(tensor: Tensor) -> None:
    """Wait for the device that holds ``tensor``."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
