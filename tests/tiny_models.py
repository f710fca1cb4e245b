"""Small random Hugging Face models, one a variant that conversion must get right.

Every parameter is random, norms and biases too (transformers starts those at one and zero, where a mix-up of names
would not show), and large enough for logits of a trained model's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 300.0,  # one wavelength below, one between, two above the limits
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# name: (family, config beside _BASE)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("Llama", {"vocab_size": 256, "tie_word_embeddings": True}),
    "llama-odd-vocab": ("Llama", {"vocab_size": 131, "tie_word_embeddings": False}),
    "llama3-rope": ("Llama", {"vocab_size": 128, "tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE}),
    "qwen2": ("Qwen2", {"vocab_size": 301, "tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"vocab_size": 97, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"vocab_size": 151, "tie_word_embeddings": True, "head_dim": 16}),
    "qwen3-no-groups": (
        "Qwen3",
        {"vocab_size": 130, "tie_word_embeddings": False, "head_dim": 12, "num_key_value_heads": 4},
    ),
}


def tiny_config(variant: str) -> Any:
    """The transformers config of a variant."""
    import transformers  # here, so that ranks that import a test module don't wait for it

    family, own = VARIANTS[variant]
    return getattr(transformers, f"{family}Config")(**(_BASE | own))


def tiny_model(variant: str, dtype: torch.dtype = torch.float32) -> Any:
    """A variant with weights that depend on nothing but its name."""
    import transformers

    return _filled(getattr(transformers, f"{VARIANTS[variant][0]}ForCausalLM")(tiny_config(variant)), variant, dtype)


def tiny_reward_model(variant: str, dtype: torch.dtype = torch.float32) -> Any:
    """A variant's decoder under a head of one output; the last vocabulary entry is its padding."""
    import transformers

    config = tiny_config(variant)
    config.num_labels, config.pad_token_id = 1, config.vocab_size - 1
    kind = getattr(transformers, f"{VARIANTS[variant][0]}ForSequenceClassification")
    return _filled(kind(config), variant, dtype)


def _filled(model: Any, variant: str, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(list(VARIANTS).index(variant))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name else 0.5 if "norm" in name or "bias" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + float("norm" in name))
    return model.to(dtype).eval()


def save_tiny(folder: Path, variant: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB") -> Path:
    """Write a variant as a Hugging Face folder; returns the folder."""
    path = folder / f"{variant}-{str(dtype).removeprefix('torch.')}"
    tiny_model(variant, dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def save_tiny_reward_model(folder: Path, variant: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a variant's reward model as a Hugging Face folder; returns the folder."""
    path = folder / f"{variant}-reward-{str(dtype).removeprefix('torch.')}"
    tiny_reward_model(variant, dtype).save_pretrained(path, max_shard_size="40KB")
    return path
