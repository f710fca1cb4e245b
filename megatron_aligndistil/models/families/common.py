"""What the families' configs have in common, and the refusals of what isn't implemented."""

from __future__ import annotations

import math
from typing import Any

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture, Llama3RopeScaling

_SHOWN_CHARACTERS = 80

# Far beyond any model: a config with more is damaged, and would only be noticed when memory runs out.
_LARGEST = {
    "num_layers": 2**12,
    "hidden_size": 2**20,
    "ffn_hidden_size": 2**22,
    "num_attention_heads": 2**14,
    "num_query_groups": 2**14,
    "head_dim": 2**14,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**32,
}


def place_of(config: Any) -> str:
    """The folder or file of a config, for error messages."""
    return str(getattr(config, "_name_or_path", "") or "config.json")


def refuse(config: Any, name: str, value: object, supported: str) -> CheckpointError:
    """The error for a config entry that we'd have to ignore."""
    shown = repr(value)[:_SHOWN_CHARACTERS]
    return CheckpointError(
        f"{place_of(config)}: {config.model_type} with {name}={shown} is not implemented; supported: {supported}"
    )


def check_sizes(config: Any, architecture: Architecture) -> None:
    """Refuse sizes that no model has.

    Raises:
        CheckpointError: names the size and its value.
    """
    for name, largest in _LARGEST.items():
        value = getattr(architecture, name)
        if type(value) is not int or not 1 <= value <= largest:
            raise refuse(config, name, value, f"whole numbers from 1 to {largest}")
    positive = {"rms_norm_eps": architecture.rms_norm_eps, "rope_theta": architecture.rope_theta}
    if architecture.rope_scaling is not None:
        positive |= vars(architecture.rope_scaling)
    for name, value in positive.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise refuse(config, name, value, "numbers above 0")
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    if heads % groups:
        raise refuse(config, "num_key_value_heads", groups, f"divisors of num_attention_heads={heads}")


def dense_decoder(config: Any, *, qkv_bias: bool, qk_norm: bool) -> Architecture:
    """The architecture of a transformers config of the Llama line (RMSNorm, RoPE, grouped queries, SwiGLU).

    Raises:
        CheckpointError: an activation, a RoPE variant or an attention pattern that isn't implemented.
    """
    if config.hidden_act != "silu":
        raise refuse(config, "hidden_act", config.hidden_act, "silu")
    sliding = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    if sliding:
        raise refuse(config, "layer_types", sorted(sliding), "full_attention (use_sliding_window: false)")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = dict(config.rope_parameters)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(config, "partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    return Architecture(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads or heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(config, rope),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied_embeddings=bool(config.tie_word_embeddings),
    )


def _rope_scaling(config: Any, rope: dict[str, Any]) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise refuse(config, "rope_type", kind, "default, llama3")
    return Llama3RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )
