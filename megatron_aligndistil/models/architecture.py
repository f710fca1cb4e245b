"""What a model is, independent of its family's Hugging Face config and of the parallel layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3's frequency-dependent RoPE scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Architecture:
    """A dense decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Its head gives a logit a vocabulary entry, or one number (``scalar_head``: reward models and critics).
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    scalar_head: bool = False

    def with_scalar_head(self) -> Architecture:
        """The same decoder under a head of one output, which shares nothing with the embedding."""
        return replace(self, scalar_head=True, tied_embeddings=False)

    def padded_vocab_size(self, divisible_by: int, tensor_parallel: int) -> int:
        """Vocabulary rows including padding.

        Depends on the layout only where ``tensor_parallel`` doesn't divide ``divisible_by``, so that checkpoints have
        the same shapes under every usual layout.
        """
        unit = math.lcm(divisible_by, tensor_parallel)
        return -(-self.vocab_size // unit) * unit
