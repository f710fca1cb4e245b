"""Sound model folders and files of every form, to be spoiled."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file

from megatron_aligndistil.checkpoint.adapter_config import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, peft_config
from megatron_aligndistil.models.lora import LoRASettings

RANK = 2


def write_shards(model: Path, folder: Path) -> Path:
    """The weights of a Hugging Face folder in two files with an index, beside its config."""
    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in halves.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


def write_peft(base: Path, folder: Path) -> Path:
    """An adapter over the feed-forward projections of ``base``."""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (outputs, inputs) in {"down_proj": (hidden, ffn)}.items():
            stem = f"{PEFT_PREFIX}model.layers.{layer}.mlp.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.ones(RANK, inputs)
            tensors[f"{stem}.lora_B.weight"] = torch.ones(outputs, RANK)
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    settings = LoRASettings(RANK, 4.0, ("mlp_fc2",))
    (folder / PEFT_CONFIG).write_text(json.dumps(peft_config(settings, base, scalar=False)))
    return folder


def write_gguf(model: Path, file: Path) -> Path:
    """The Qwen2 of a Hugging Face folder as a GGUF file, its tokenizer included."""
    config = json.loads((model / "config.json").read_text())
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in ("<pad>", "<eos>") else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
