"""Llama 2 and 3, and what shares their architecture (SmolLM2): no bias anywhere."""

from __future__ import annotations

from typing import Any

from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families.common import dense_decoder, refuse
from megatron_aligndistil.models.families.table import DECODER, Table

TABLE: Table = DECODER


def architecture(config: Any) -> Architecture:
    """The architecture of a transformers ``LlamaConfig``.

    Raises:
        CheckpointError: a variant that isn't implemented.
    """
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise refuse(config, name, True, "false")
    return dense_decoder(config, qkv_bias=False, qk_norm=False)
