"""Qwen2 and Qwen2.5: biases on query, key and value."""

from __future__ import annotations

from typing import Any

from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families.common import dense_decoder
from megatron_aligndistil.models.families.table import DECODER, QKV_BIAS, Table

TABLE: Table = DECODER + QKV_BIAS


def architecture(config: Any) -> Architecture:
    """The architecture of a transformers ``Qwen2Config``.

    Raises:
        CheckpointError: a variant that isn't implemented (sliding windows in use, RoPE scaling but Llama 3's).
    """
    return dense_decoder(config, qkv_bias=True, qk_norm=False)
