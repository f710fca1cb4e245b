"""Name tables: which Hugging Face tensors make up which Megatron-Core parameter, by which rule, in which shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families.rules import GATED, QKV, REPLICATED, ROW, VOCAB, Rule, Shape

LAYER = "*"  # stands for the layer's number in both names

# Transformer Engine fuses a norm into the linear layer behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Entry:
    """One line of a name table. ``parts`` maps Hugging Face names to shapes: numbers, or names of ``dimensions``."""

    parameter: str
    rule: Rule
    parts: tuple[tuple[str, tuple[str | int, ...]], ...]

    @property
    def per_layer(self) -> bool:
        return LAYER in self.parameter

    def hf_shapes(self, architecture: Architecture, layer: int | None) -> dict[str, Shape]:
        """Hugging Face name → shape, for layer ``layer`` (from 0; None for what belongs to no layer)."""
        sizes = dimensions(architecture)
        return {
            name if layer is None else name.replace(LAYER, str(layer)): tuple(
                axis if isinstance(axis, int) else sizes[axis] for axis in axes
            )
            for name, axes in self.parts
        }


Table = tuple[Entry, ...]


def _layer(parameter: str, rule: Rule, **parts: tuple[str, ...]) -> Entry:
    """A line for every layer; ``parts`` names Hugging Face modules with ``__`` for the dot."""
    kind = parameter.rsplit(".", 1)[1]
    named = tuple((f"model.layers.{LAYER}.{module.replace('__', '.')}.{kind}", axes) for module, axes in parts.items())
    return Entry(f"decoder.layers.{LAYER}.{parameter}", rule, named)


EMBEDDING = Entry("embedding.word_embeddings.weight", VOCAB, (("model.embed_tokens.weight", ("vocab", "hidden")),))
HEAD = Entry("output_layer.weight", VOCAB, (("lm_head.weight", ("vocab", "hidden")),))
SCALAR_HEAD = Entry("score_head.weight", REPLICATED, (("score.weight", ("score", "hidden")),))

DECODER: Table = (
    _layer("input_layernorm.weight", REPLICATED, input_layernorm=("hidden",)),
    _layer(
        "self_attention.linear_qkv.weight",
        QKV,
        self_attn__q_proj=("query", "hidden"),
        self_attn__k_proj=("key", "hidden"),
        self_attn__v_proj=("key", "hidden"),
    ),
    _layer("self_attention.linear_proj.weight", ROW, self_attn__o_proj=("hidden", "query")),
    _layer("pre_mlp_layernorm.weight", REPLICATED, post_attention_layernorm=("hidden",)),
    _layer("mlp.linear_fc1.weight", GATED, mlp__gate_proj=("ffn", "hidden"), mlp__up_proj=("ffn", "hidden")),
    _layer("mlp.linear_fc2.weight", ROW, mlp__down_proj=("hidden", "ffn")),
    Entry("decoder.final_layernorm.weight", REPLICATED, (("model.norm.weight", ("hidden",)),)),
)
QKV_BIAS: Table = (
    _layer(
        "self_attention.linear_qkv.bias",
        QKV,
        self_attn__q_proj=("query",),
        self_attn__k_proj=("key",),
        self_attn__v_proj=("key",),
    ),
)
QK_NORM: Table = (
    _layer("self_attention.q_layernorm.weight", REPLICATED, self_attn__q_norm=("head",)),
    _layer("self_attention.k_layernorm.weight", REPLICATED, self_attn__k_norm=("head",)),
)


def dimensions(architecture: Architecture) -> dict[str, int]:
    """The named dimensions of a table."""
    return {
        "score": 1,
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "head": architecture.head_dim,
        "query": architecture.num_attention_heads * architecture.head_dim,
        "key": architecture.num_query_groups * architecture.head_dim,
    }


def lines(table: Table, architecture: Architecture) -> Iterator[tuple[Entry, int | None]]:
    """Every (entry, layer) of a model in the order of a forward pass, without the copy of a tied head."""
    yield EMBEDDING, None
    for layer in range(architecture.num_layers):
        yield from ((entry, layer) for entry in table if entry.per_layer)
    yield from ((entry, None) for entry in table if not entry.per_layer)
    if architecture.scalar_head:
        yield SCALAR_HEAD, None
    elif not architecture.tied_embeddings:
        yield HEAD, None


def hf_shapes(table: Table, architecture: Architecture) -> dict[str, Shape]:
    """Every Hugging Face tensor of a model with its shape, in the order of ``lines``."""
    shapes: dict[str, Shape] = {}
    for entry, layer in lines(table, architecture):
        shapes.update(entry.hf_shapes(architecture, layer))
    return shapes


def entry_of(table: Table, architecture: Architecture, parameter: str) -> Entry:
    """The line for a parameter, ``parameter`` being its name with ``LAYER`` in place of the layer's number.

    Raises:
        KeyError: the table has no such line, so the model was built for another architecture (a bug).
    """
    for fused, plain in _FUSED_NORMS.items():
        parameter = parameter.replace(fused, plain)
    if parameter == HEAD.parameter and architecture.tied_embeddings:
        # A last stage that doesn't hold the embedding keeps a copy of it.
        return Entry(HEAD.parameter, VOCAB, EMBEDDING.parts)
    return {entry.parameter: entry for entry in (EMBEDDING, *table, HEAD, SCALAR_HEAD)}[parameter]
