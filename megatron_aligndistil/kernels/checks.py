"""What every op demands of its inputs. A violation is a bug of the caller, hence ValueError and not UserError."""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.types import VocabHead


def check_rows(hidden_TH: Tensor, head: VocabHead) -> None:
    """Hidden states [T, H] that fit the head."""
    if hidden_TH.dim() != 2 or hidden_TH.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"hidden states {list(hidden_TH.shape)} don't fit a head [V, H] of {list(head.weight.shape)}: want [T, H]"
        )


def check_same_columns(head: VocabHead, other: VocabHead) -> None:
    """Two heads over the same vocabulary, sharded alike."""
    columns, other_columns = (
        (h.vocab_size, h.valid_columns, h.first_column if h.valid_columns else None) for h in (head, other)
    )
    if columns != other_columns:
        raise ValueError(
            "heads must hold the same columns (vocab_size, columns of this shard, first column): "
            f"{columns} and {other_columns}"
        )


def check_same_rows(hidden_TH: Tensor, other_TH: Tensor) -> None:
    """Hidden states of the same tokens; the two models' widths may differ."""
    if hidden_TH.shape[0] != other_TH.shape[0]:
        raise ValueError(f"hidden states of {hidden_TH.shape[0]} and of {other_TH.shape[0]} tokens: want the same ones")
