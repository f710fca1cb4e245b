"""Core attention on torch's ``scaled_dot_product_attention``, for devices without Transformer Engine.

Shape legend: S positions, B rows, A heads of this rank, G key-value groups of this rank, D head size, T = tokens of a
packed row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_aligndistil.parallel import context, groups


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention with grouped keys and values; a packed row attends within its sequences only.

    Takes the place of Megatron-Core's ``DotProductAttention``. Right-padded rows need no mask: under a causal one no
    real token sees the padding behind it. Under context parallelism keys and values of whole rows are gathered: right,
    and enough to test the rest of that path; Transformer Engine's exchange is the one to train with.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **unused: Any) -> None:
        super().__init__()
        self.softmax_scale = config.softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """Query [S, B, A, D] with key and value [S, B, G, D] → [S, B, A·D]; packed: [T, A, D] → [T, A·D]."""
        if packed_seq_params is None:
            mask_LS = _causal_mask(len(query), query.device)
            key, value = context.gather_positions(key), context.gather_positions(value)
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out_BASD = self._attend(query, key, value, mask_LS)
            return out_BASD.permute(2, 0, 1, 3).flatten(2)
        pieces = packed_seq_params.cu_seqlens_q.diff().tolist()
        split = zip(*(x.transpose(0, 1).split(pieces, dim=1) for x in (query, key, value)), strict=True)
        out_ATD = torch.cat([self._attend(*(x[None] for x in piece))[0] for piece in split], dim=1)
        return out_ATD.transpose(0, 1).flatten(1)

    def _attend(
        self, query_BASD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask_LS: Tensor | None = None
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query_BASD,
            key_BGSD,
            value_BGSD,
            attn_mask=mask_LS,
            is_causal=mask_LS is None,
            scale=self.softmax_scale,
            enable_gqa=query_BASD.shape[1] != key_BGSD.shape[1],
        )


def _causal_mask(length: int, device: torch.device) -> Tensor | None:
    """Which of all S positions each of this rank's L may see [L, S]; None where this rank holds whole rows."""
    axis = groups.context()
    if axis.size == 1:
        return None
    own_L = context.own_positions(length * axis.size, axis, device)
    return own_L[:, None] >= torch.arange(length * axis.size, device=device)
