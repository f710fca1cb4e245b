"""Qwen3 (dense): RMSNorm on every query and key head, head size apart from hidden size, no bias."""

from __future__ import annotations

from typing import Any

from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families.common import dense_decoder, refuse
from megatron_aligndistil.models.families.table import DECODER, QK_NORM, Table

TABLE: Table = DECODER + QK_NORM


def architecture(config: Any) -> Architecture:
    """The architecture of a transformers ``Qwen3Config``.

    Raises:
        CheckpointError: a variant that isn't implemented.
    """
    if config.attention_bias:
        raise refuse(config, "attention_bias", True, "false")
    return dense_decoder(config, qkv_bias=False, qk_norm=True)
