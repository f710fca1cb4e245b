"""The name table of LoRA adapters: which PEFT tensors make up which of our parameters.

A projection that fuses several Hugging Face matrices has an A and a B for each of them, as PEFT does, so that adapters
are exchanged without arithmetic. A's of a column-parallel projection are whole on every tensor rank and its B's are
sharded along their rows, as the weight is; a row-parallel projection has it the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_aligndistil.models.families.rules import QKV, REPLICATED, ROW, Rule, Shape, share
from megatron_aligndistil.models.families.table import DECODER, LAYER, Entry, Table

# NeMo's names of the projections, and ours.
PROJECTIONS = {
    "attention_qkv": "self_attention.linear_qkv",
    "attention_dense": "self_attention.linear_proj",
    "mlp_fc1": "mlp.linear_fc1",
    "mlp_fc2": "mlp.linear_fc2",
}
DOWN, UP = "lora_a", "lora_b"  # our parameters' names
PEFT_DOWN, PEFT_UP = "lora_A.weight", "lora_B.weight"


def _merge_pair(shards: Sequence[Tensor], shapes: Sequence[Shape], query_groups: int) -> list[Tensor]:
    return [torch.cat([shard[index] for shard in shards]) for index in range(len(shapes))]


# The A's of a fused projection, one after another: [parts, rank, in].
STACKED = Rule(
    "stacked",
    split=lambda parts, slot: torch.stack([part.take(0, 0, part.shape[0]) for part in parts]),
    merge=lambda shards, shapes, groups: list(shards[0].unbind()),
    sharded=False,
)
# The B's of gate and up projection: [2, out / TP, rank].
PAIR = Rule("pair", split=lambda parts, slot: torch.stack([share(part, slot, 0) for part in parts]), merge=_merge_pair)

_UP_RULES = {"qkv": QKV, "gated": PAIR, "row": REPLICATED}


def lora_table(targets: Iterable[str], rank: int) -> Table:
    """Two lines for each of the targeted projections (keys of ``PROJECTIONS``), for adapters of ``rank``."""
    weights = {entry.parameter: entry for entry in DECODER}
    lines: list[Entry] = []
    for target in targets:
        module = f"decoder.layers.{LAYER}.{PROJECTIONS[target]}"
        fused = weights[f"{module}.weight"]
        down_rule = ROW if fused.rule is ROW else STACKED
        down = tuple((_adapted(name, PEFT_DOWN), (rank, axes[1])) for name, axes in fused.parts)
        up = tuple((_adapted(name, PEFT_UP), (axes[0], rank)) for name, axes in fused.parts)
        lines += [
            Entry(f"{module}.{DOWN}", down_rule, down),
            Entry(f"{module}.{UP}", _UP_RULES[fused.rule.name], up),
        ]
    return tuple(lines)


def _adapted(weight: str, suffix: str) -> str:
    return f"{weight.removesuffix('weight')}{suffix}"


def hf_modules(targets: Iterable[str]) -> list[str]:
    """PEFT's ``target_modules`` of the targeted projections: q_proj, k_proj, …"""
    return [name.rsplit(".", 3)[1] for entry in lora_table(targets, 1)[::2] for name, _ in entry.parts]
