"""Building the sharded model: a Megatron-Core GPT whose last stage ends at the last hidden state.

The head is applied by a kernel, which needs the hidden states and the head's shard (``heads.head_of``); no module ever
returns logits. A reward model or a critic has a head of one output in its place.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_aligndistil.models.architecture import Architecture, Llama3RopeScaling
from megatron_aligndistil.models.attention import ScaledDotProductAttention
from megatron_aligndistil.models.norm import RMSNorm
from megatron_aligndistil.parallel import groups
from megatron_aligndistil.parallel.setup import Layout

logger = logging.getLogger(__name__)

_SHARDED_ALONG = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}


@dataclass(frozen=True)
class Recompute:
    """Activation recomputation, in Megatron-Core's terms."""

    granularity: str | None = None  # None | "selective" | "full"
    method: str | None = None  # "uniform" | "block", with "full"
    num_layers: int | None = None


@dataclass(frozen=True)
class ModelSettings:
    """What the run decides about a model, beside its architecture.

    separate_norms  Transformer Engine's norms are modules of their own: an adapter's input is what they return
    """

    layout: Layout
    dtype: torch.dtype
    max_sequence_length: int
    vocab_divisible_by: int
    transformer_engine: bool
    recompute: Recompute = Recompute()
    separate_norms: bool = False


def transformer_engine_usable() -> bool:
    """Whether Transformer Engine is installed and there is a GPU to run it on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


class HiddenStateModel(GPTModel):
    """A GPT that returns the last stage's hidden states [S, B, H] ([S/TP, B, H] under sequence parallelism)."""

    architecture: Architecture
    adapters: Any = None  # lora.Adapters, where some lie over it

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class ScalarHeadModel(HiddenStateModel):
    """A ``HiddenStateModel`` with ``score_head`` (Linear, H → 1) on the last stage, the same on every tensor rank.

    The head isn't marked as sequence-parallel: it is applied to whole rows (``heads.project``), so each tensor rank has
    its whole gradient.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.post_process:
            del self.output_layer  # Megatron-Core's model has one whatever it is told
            self.score_head = torch.nn.utils.skip_init(
                torch.nn.Linear, self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """The modules' states; what ``GPTModel`` adds is about the output layer."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)


def build_chunks(architecture: Architecture, settings: ModelSettings) -> list[HiddenStateModel]:
    """The model chunks of this rank, on this rank's device, with uninitialised weights.

    One chunk, or as many as the virtual pipeline asks for.
    """
    config = transformer_config(architecture, settings)
    model = ScalarHeadModel if architecture.scalar_head else HiddenStateModel
    virtual = settings.layout.virtual_pipeline
    last_chunk = (virtual or 1) - 1
    chunks = []
    for index in range(virtual or 1):
        stage = index if virtual else None
        chunk = model(
            config=config,
            transformer_layer_spec=_block_spec(config, architecture, settings, stage),
            vocab_size=architecture.padded_vocab_size(settings.vocab_divisible_by, settings.layout.tensor),
            max_sequence_length=settings.max_sequence_length,
            pre_process=groups.is_first_stage() and index == 0,
            post_process=groups.is_last_stage() and index == last_chunk,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            vp_stage=stage,
        )
        chunk.architecture = architecture
        if architecture.rope_scaling is not None:
            chunk.rotary_pos_emb.inv_freq = scaled_inverse_frequencies(
                chunk.rotary_pos_emb.inv_freq, architecture.rope_scaling
            )
        _mark_shards(chunk)
        chunks.append(chunk.to(torch.cuda.current_device()))
    return chunks


def _mark_shards(chunk: HiddenStateModel) -> None:
    """Mark the weights of which this rank holds a part, as Megatron-Core does only where it initialises them.

    Unmarked ones count in the gradient's norm on the first tensor rank alone, as copies do.
    """
    for module in chunk.modules():
        for kind, dimension in _SHARDED_ALONG.items():
            weight = module.weight if isinstance(module, kind) else None
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, dimension, 1)


def transformer_config(architecture: Architecture, settings: ModelSettings) -> TransformerConfig:
    """Megatron-Core's description of ``architecture`` under ``settings``."""
    layout, fused = settings.layout, settings.transformer_engine
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=settings.dtype,
        pipeline_dtype=settings.dtype,
        bf16=settings.dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        # Rows are padded to their micro-batch's longest, so stages must tell each other the shape.
        # With chunks interleaved they can't, and micro-batches have one shape (data.collate); with two stages each is
        # the other's next and previous, which only unbatched sends tell apart.
        variable_seq_lengths=layout.pipeline > 1 and not layout.virtual_pipeline,
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        # Dense models dispatch no tokens, but the config refuses variable lengths with its default.
        moe_token_dispatcher_type="alltoall",
        # The step divides by the global count once (DESIGN 4).
        calculate_per_token_loss=True,
        # Every weight is loaded; TP ranks would otherwise draw and throw away whole matrices.
        perform_initialization=False,
        recompute_granularity=settings.recompute.granularity,
        recompute_method=settings.recompute.method,
        recompute_num_layers=settings.recompute.num_layers,
        gradient_accumulation_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )


def _block_spec(
    config: TransformerConfig, architecture: Architecture, settings: ModelSettings, stage: int | None
) -> Any:
    if settings.transformer_engine:
        fused = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_norm)
        return _with_separate_norms(fused) if settings.separate_norms else fused
    layer: ModuleSpec = get_gpt_layer_local_spec(qk_layernorm=architecture.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def _with_separate_norms(layer: ModuleSpec) -> ModuleSpec:
    """Transformer Engine's layer with each norm before its linear layer; checkpoints have the fused one's names."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = TENorm
    parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    parts.sharded_state_dict_keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return layer


def scaled_inverse_frequencies(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Llama 3's RoPE scaling of inverse frequencies [D/2].

    Long wavelengths are divided by ``factor``, short ones kept, those between interpolated.
    """
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    longest, shortest = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    smooth = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    divided = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    blended = (1 - smooth) * divided / scaling.factor + smooth * divided
    between = (wavelengths <= longest) & (wavelengths >= shortest)
    return torch.where(between, blended, divided)
