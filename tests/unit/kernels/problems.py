"""Problems for the kernels: random models over an odd vocabulary, whole and as shards.

Shapes: T tokens, H hidden size, V vocabulary including padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_aligndistil.kernels.backends import build
from megatron_aligndistil.kernels.extrapolated_kl import Extrapolation
from megatron_aligndistil.kernels.extrapolated_kl.reference import DenseModel
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.types import VocabHead

ADAPTIVE = Extrapolation(mode="adaptive", alpha=20.0, epsilon=1e-3, tvd_scale=1.0)
CONSTANT = Extrapolation(mode="constant", alpha=1.5, epsilon=1e-3, tvd_scale=1.0)


def every_way(chunks: tuple[int | None, ...] = (1, 5, None)) -> list[KernelSettings]:
    """Settings over plans, chunks and the backends of a CPU."""
    return [
        KernelSettings(plan=plan, chunk_tokens=chunk, backend=backend)  # type: ignore[arg-type]
        for plan in ("store", "recompute")
        for backend in ("pytorch", "native")
        for chunk in chunks
    ]


def way_id(settings: KernelSettings) -> str:
    """For pytest."""
    return f"{settings.plan}-{settings.backend}-{settings.chunk_tokens}"


def takes(settings: KernelSettings, dtype: torch.dtype) -> bool:
    """The compiled loops have no float64."""
    return settings.backend == "pytorch" or dtype != torch.float64


def skip_without_bf16(backend: str) -> None:
    """The compiled loops have bf16 products on processors that have them only."""
    if backend == "native" and not build.native_takes(torch.bfloat16):
        pytest.skip("no C++ compiler, or a processor without bf16 products")


# Relative errors that a gradient may have against float64.
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass
class Model:
    """Hidden states [T, H] and a whole padded head [V, H]. Padding rows are NaN: whoever reads one shows it."""

    hidden_TH: Tensor
    weight_VH: Tensor
    vocab_size: int

    def dense(self) -> DenseModel:
        """The reference's float64 leaves of the same numbers."""
        hidden_TH, weight_VH = (x.detach().double().requires_grad_() for x in (self.hidden_TH, self.weight_VH))
        return DenseModel(hidden_TH, weight_VH, self.vocab_size)

    def leaf(self, rank: int = 0, ranks: int = 1, group: ProcessGroup | None = None) -> tuple[Tensor, VocabHead]:
        """Leaves of one rank: hidden states, and the rank's part of the head."""
        size = self.weight_VH.shape[0] // ranks
        shard = self.weight_VH[rank * size : (rank + 1) * size].detach().clone().requires_grad_()
        head = VocabHead(shard, self.vocab_size, first_column=rank * size, group=group)
        return self.hidden_TH.detach().clone().requires_grad_(), head


@dataclass(frozen=True)
class Shape:
    tokens: int = 13
    hidden: int = 24
    vocab: int = 53
    padded: int = 64


def models(shape: Shape, dtype: torch.dtype, seed: int = 0, count: int = 3) -> list[Model]:
    """Models that differ moderately, as a policy and its teachers do; logits of about unit to ten magnitude."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    base_hidden, base_weight = normal(shape.tokens, shape.hidden), normal(shape.padded, shape.hidden)
    made = []
    for _ in range(count):
        weight = 0.5 * base_weight + 0.15 * normal(shape.padded, shape.hidden)
        weight[shape.vocab :] = torch.nan
        hidden = base_hidden + 0.3 * normal(shape.tokens, shape.hidden)
        made.append(Model(hidden.to(dtype), weight.to(dtype), shape.vocab))
    return made


def upstream(tokens: int, dtype: torch.dtype) -> Tensor:
    """Per-token weights over several magnitudes and both signs, [T]."""
    generator = torch.Generator().manual_seed(99)
    return (torch.randn(tokens, generator=generator, dtype=torch.float64).exp() * torch.arange(-2, tokens - 2)).to(
        dtype
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    return float((actual.double() - expected).norm() / expected.norm())


def true_rows(gradient_VH: Tensor, vocab_size: int) -> Tensor:
    """A whole head's gradient without its padding."""
    return gradient_VH[:vocab_size]
