"""Families: what a Hugging Face config becomes, which names it has, and how its tensors are cut and joined."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models import families
from megatron_aligndistil.models.architecture import Llama3RopeScaling
from megatron_aligndistil.models.families.rules import GATED, QKV, REPLICATED, ROW, VOCAB, Rule, Slot
from megatron_aligndistil.models.families.table import DECODER, HEAD, SCALAR_HEAD, entry_of, hf_shapes
from tests.tiny_models import VARIANTS, tiny_config, tiny_model, tiny_reward_model


@dataclass
class InMemory:
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def take(self, dimension: int, start: int, stop: int) -> Tensor:
        assert 0 <= start <= stop <= self.shape[dimension]
        return self.tensor.narrow(dimension, start, stop - start)


def cut(rule: Rule, tensors: list[Tensor], shape: tuple[int, ...], size: int, groups: int = 1) -> list[Tensor]:
    parts = [InMemory(tensor) for tensor in tensors]
    return [rule.split(parts, Slot(shape, rank, size, groups)) for rank in range(size)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_names_exactly_the_tensors_of_transformers(variant):
    config = tiny_config(variant)
    architecture = families.architecture_of(config)
    expected = {name: tuple(tensor.shape) for name, tensor in tiny_model(variant).state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]  # the embedding again
    assert hf_shapes(families.table_of(architecture), architecture) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_names_exactly_the_tensors_of_transformers_reward_models(variant):
    model = tiny_reward_model(variant)
    model.config.architectures = [type(model).__name__]
    architecture = families.architecture_of(model.config)
    assert architecture == families.architecture_of(tiny_config(variant)).with_scalar_head()
    shapes = hf_shapes(families.table_of(architecture), architecture)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert entry_of(families.table_of(architecture), architecture, "score_head.weight") is SCALAR_HEAD


@pytest.mark.parametrize("variant", VARIANTS)
def test_architecture_is_the_configs(variant):
    config, architecture = tiny_config(variant), families.architecture_of(tiny_config(variant))
    assert architecture.family == config.model_type
    assert architecture.head_dim == {"qwen3": 16, "qwen3-no-groups": 12}.get(variant, 8)
    assert architecture.num_query_groups == config.num_key_value_heads
    assert architecture.tied_embeddings is config.tie_word_embeddings
    assert architecture.qkv_bias == variant.startswith("qwen2")
    assert architecture.qk_norm == variant.startswith("qwen3")
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 32) if variant == "llama3-rope" else None
    assert architecture.rope_scaling == scaling
    assert architecture.rope_theta == (300.0 if scaling else 10000.0)


@pytest.mark.parametrize(
    ("variant", "entry", "value", "named"),
    [
        ("llama-tied", "attention_bias", True, "attention_bias=True"),
        ("llama-tied", "mlp_bias", True, "mlp_bias=True"),
        ("llama-tied", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("qwen3", "attention_bias", True, "attention_bias=True"),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"] * 2, "use_sliding_window"),
        ("qwen2", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "rope_type='yarn'"),
        (
            "llama-tied",
            "rope_parameters",
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "rope_type='linear'",
        ),
        (
            "llama-tied",
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5",
        ),
        ("qwen2", "model_type", "qwen2_moe", "model_type='qwen2_moe'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(variant, entry, value, named):
    config = tiny_config(variant)
    setattr(config, entry, value)
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")) as refusal:
        families.architecture_of(config)
    assert "\n" not in str(refusal.value)


def test_an_unused_sliding_window_is_no_obstacle():
    config = tiny_config("qwen2")
    config.sliding_window = 16
    assert families.architecture_of(config).num_layers == 4


def test_fused_norms_of_transformer_engine_are_the_plain_ones():
    architecture = families.architecture_of(tiny_config("llama-tied"))
    for fused, plain in {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }.items():
        assert entry_of(DECODER, architecture, f"decoder.layers.*.{fused}").parameter == f"decoder.layers.*.{plain}"


def test_a_tied_head_is_the_embedding_and_an_untied_one_its_own():
    tied, untied = (families.architecture_of(tiny_config(name)) for name in ("qwen2", "qwen2-untied"))
    assert list(entry_of(DECODER, tied, HEAD.parameter).hf_shapes(tied, None)) == ["model.embed_tokens.weight"]
    assert list(entry_of(DECODER, untied, HEAD.parameter).hf_shapes(untied, None)) == ["lm_head.weight"]
    with pytest.raises(KeyError):
        entry_of(DECODER, tied, "decoder.layers.*.self_attention.linear_qkv.bias")


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 4]),
    groups_per_rank=st.integers(1, 3),
    heads_per_group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6]),
    bias=st.booleans(),
)
def test_qkv_holds_each_groups_queries_then_its_key_then_its_value(
    size, groups_per_rank, heads_per_group, head_dim, bias
):
    groups = size * groups_per_rank
    columns = () if bias else (3,)
    query = torch.randn(groups * heads_per_group * head_dim, *columns)
    key, value = torch.randn(groups * head_dim, *columns), torch.randn(groups * head_dim, *columns)
    rows = []  # the definition, a head at a time
    for group in range(groups):
        for head in range(group * heads_per_group, (group + 1) * heads_per_group):
            rows.append(query[head * head_dim : (head + 1) * head_dim])
        rows.append(key[group * head_dim : (group + 1) * head_dim])
        rows.append(value[group * head_dim : (group + 1) * head_dim])
    expected = torch.cat(rows).chunk(size)
    shards = cut(QKV, [query, key, value], tuple(expected[0].shape), size, groups)
    assert all(torch.equal(shard, part) for shard, part in zip(shards, expected, strict=True))
    merged = QKV.merge(shards, [tuple(t.shape) for t in (query, key, value)], groups)
    assert all(torch.equal(found, t) for found, t in zip(merged, (query, key, value), strict=True))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_and_up_are_cut_each_and_stacked(size):
    gate, up = torch.randn(8, 3), torch.randn(8, 3)
    shards = cut(GATED, [gate, up], (16 // size, 3), size)
    rows = 8 // size
    for rank, shard in enumerate(shards):
        assert torch.equal(shard[:rows], gate[rank * rows : (rank + 1) * rows])
        assert torch.equal(shard[rows:], up[rank * rows : (rank + 1) * rows])
    merged = GATED.merge(shards, [(8, 3), (8, 3)], 1)
    assert torch.equal(merged[0], gate) and torch.equal(merged[1], up)


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from([1, 2, 3, 4]), vocab_size=st.integers(1, 40), extra=st.integers(0, 30))
def test_vocabulary_is_padded_with_zeros_and_cut(size, vocab_size, extra):
    rows = -(-(vocab_size + extra) // size)
    weight = torch.randn(vocab_size, 3)
    shards = cut(VOCAB, [weight], (rows, 3), size)
    whole = torch.cat(shards)
    assert whole.shape == (rows * size, 3)
    assert torch.equal(whole[:vocab_size], weight) and not whole[vocab_size:].any()
    assert torch.equal(VOCAB.merge(shards, [(vocab_size, 3)], 1)[0], weight)


def test_rows_are_cut_along_input_features_and_norms_not_at_all():
    weight, norm = torch.randn(3, 8), torch.randn(5)
    shards = cut(ROW, [weight], (3, 4), 2)
    assert torch.equal(shards[1], weight[:, 4:])
    assert torch.equal(ROW.merge(shards, [(3, 8)], 1)[0], weight)
    assert all(torch.equal(shard, norm) for shard in cut(REPLICATED, [norm], (5,), 2))
