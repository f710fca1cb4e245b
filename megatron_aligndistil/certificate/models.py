"""Small random models and examples that every rank makes alike, in memory, whatever the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from megatron_aligndistil.certificate import dense_model
from megatron_aligndistil.models import families
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families.rules import MemoryPart, Shape
from megatron_aligndistil.models.families.table import hf_shapes
from megatron_aligndistil.parallel.setup import Layout
from megatron_aligndistil.types import Example, Sequence

VOCAB_SIZE = 83  # a prime: no tensor-parallel size divides it
ROLES = ("policy", "dpo", "reverse", "initial", "old", "critic", "old critic", "reward")
SCALAR_ROLES = frozenset({"critic", "old critic", "reward"})  # a head of one output
EARLIER = {"old": "policy", "old critic": "critic"}  # models as they were when the responses were drawn
DRIFT = 0.05  # how far training has taken them from there, in deviations of a weight


def architecture_for(layout: Layout, tied: bool) -> Architecture:
    """A model that the layout divides: biases, grouped queries, two layers or as many as stages need."""
    stages = layout.pipeline * (layout.virtual_pipeline or 1)
    key_heads = _multiple(4, layout.tensor)
    return Architecture(
        family="qwen2",
        num_layers=_multiple(2, stages),
        hidden_size=_multiple(32, layout.tensor),
        ffn_hidden_size=_multiple(40, layout.tensor),
        num_attention_heads=2 * key_heads,
        num_query_groups=key_heads,
        head_dim=4,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        qkv_bias=True,
        qk_norm=False,
        tied_embeddings=tied,
    )


def _multiple(least: int, unit: int) -> int:
    return math.ceil(least / unit) * unit


class InMemory:
    """Weights under their Hugging Face names as ``checkpoint`` reads them."""

    origin = Path("random weights")

    def __init__(self, weights: dense_model.Weights) -> None:
        self._weights = weights
        self.shapes: dict[str, Shape] = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.dtypes = {name: weight.dtype for name, weight in weights.items()}

    def part(self, name: str) -> MemoryPart:
        return MemoryPart(self._weights[name])


@dataclass(frozen=True, eq=False)  # known by identity, so that what is computed from it can be cached
class World:
    """Random models of one decoder and examples for them; float64, on the host, the same on every rank."""

    architecture: Architecture
    examples: int = 8
    _weights: dict[str, dense_model.Weights] = field(default_factory=dict)

    def architecture_of(self, role: str) -> Architecture:
        """The decoder under the head that the role has."""
        return self.architecture.with_scalar_head() if role in SCALAR_ROLES else self.architecture

    def weights(self, role: str) -> dense_model.Weights:
        """The weights of one of ``ROLES`` under Hugging Face names."""
        if role not in self._weights:
            architecture = self.architecture_of(role)
            generator = torch.Generator().manual_seed(ROLES.index(role))
            later = self.weights(EARLIER[role]) if role in EARLIER else None
            made = {}
            for name, shape in hf_shapes(families.table_of(architecture), architecture).items():
                norm = "norm" in name
                # Queries are small: sharp attention amplifies float32's rounding in every layer, beyond the bound in a
                # model of as many as deep pipelines need.
                scale = 0.1 if norm else 0.125 if name.endswith("q_proj.weight") else 0.25
                noise = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
                made[name] = later[name] + DRIFT * noise if later else (1.0 if norm else 0.0) + noise
            self._weights[role] = made
        return self._weights[role]

    def trained(self, role: str) -> dense_model.Weights:
        """What training a role changes: everything."""
        return self.weights(role)

    def assembled(self, role: str, trained: dense_model.Weights) -> dense_model.Weights:
        """The whole weights that ``trained`` comes to, differentiable."""
        return trained

    @property
    def shape(self) -> dense_model.Shape:
        """The architecture in the reference's terms."""
        a = self.architecture
        return dense_model.Shape(
            a.num_layers, a.num_attention_heads, a.num_query_groups, a.head_dim, a.rms_norm_eps, a.rope_theta
        )

    @cached_property
    def singles(self) -> list[Example]:
        """One response each."""
        return self._examples(1)

    @cached_property
    def pairs(self) -> list[Example]:
        """A chosen and a rejected response each."""
        return self._examples(2)

    def _examples(self, sequences: int) -> list[Example]:
        rng = np.random.default_rng(7 + sequences)
        return [Example(f"{i}", tuple(self._sequence(rng) for _ in range(sequences))) for i in range(self.examples)]

    def _sequence(self, rng: np.random.Generator) -> Sequence:
        """A prompt of 1 to 6 tokens and a response of 1 to 14."""
        prompt, response = int(rng.integers(1, 7)), int(rng.integers(1, 15))
        vocabulary = self.architecture.vocab_size
        return Sequence(rng.integers(0, vocabulary, prompt + response).astype(np.int32), prompt)
