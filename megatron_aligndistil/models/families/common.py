"""What the families' configs have in common, and the refusals of what isn't implemented."""

from __future__ import annotations

from typing import Any

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture, Llama3RopeScaling


def refuse(config: Any, name: str, value: object, supported: str) -> CheckpointError:
    """The error for a config entry that we'd have to ignore."""
    place = getattr(config, "_name_or_path", "") or "config.json"
    return CheckpointError(
        f"{place}: {config.model_type} with {name}={value!r} is not implemented; supported: {supported}"
    )


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
