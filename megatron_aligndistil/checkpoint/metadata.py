"""What a model folder holds beside weights: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import json
import logging
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_aligndistil.checkpoint.sources import open_gguf
from megatron_aligndistil.config.json_text import read_json
from megatron_aligndistil.errors import CheckpointError, reason
from megatron_aligndistil.models import families

logger = logging.getLogger(__name__)

CONFIG = "config.json"
_CARRIED = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab.json",
    "merges.txt",
)


def copy_metadata(source: Path, destination: Path, dtype: torch.dtype | None = None, scalar_head: bool = False) -> None:
    """Copy the metadata of a Hugging Face folder, or write a GGUF file's, into the folder ``destination``.

    Files are carried over byte for byte; ``config.json`` changes its ``dtype`` where one is given, and with
    ``scalar_head`` a language model's becomes that of transformers' sequence classifier of one label.
    """
    destination.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        _write_gguf_metadata(source, destination)
    else:
        for pattern in _CARRIED:
            for path in sorted(source.glob(pattern)):
                if path.is_dir():
                    shutil.copytree(path, destination / path.name, dirs_exist_ok=True)
                else:
                    shutil.copyfile(path, destination / path.name)
    if dtype is not None:
        _set_dtype(destination / CONFIG, str(dtype).removeprefix("torch."))
    if scalar_head:
        _set_classifier(destination)


def _set_dtype(file: Path, name: str) -> None:
    config = read_json(file)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != name:
        config[key] = name
        file.write_text(json.dumps(config, indent=2) + "\n")


def _set_classifier(folder: Path) -> None:
    config = read_json(folder / CONFIG)
    if families.is_classifier(config.get("architectures")):
        return
    config |= {
        "architectures": [f"{config['model_type'].capitalize()}ForSequenceClassification"],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "tie_word_embeddings": False,
        "pad_token_id": _pad_token_id(config, folder / "tokenizer_config.json"),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _pad_token_id(config: dict[str, Any], tokenizer: Path) -> int:
    """The token that transformers' classifier passes over to find a row's last one; it refuses batches without one."""
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    try:
        settings = read_json(tokenizer) if tokenizer.is_file() else {}
        token = settings.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        added = settings.get("added_tokens_decoder") or {}
        named = [int(i) for i, entry in added.items() if token is not None and entry.get("content") == token]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{tokenizer}: not a tokenizer's config ({reason(error)})") from error
    found = next((i for i in (config.get("pad_token_id"), *named, *ends) if i is not None), 0)
    if found in ends:
        logger.warning(
            "%s: padding is token %d, which also ends a sequence: transformers' classifier will read the score before "
            "it, training reads the score at it; give the tokenizer a padding token of its own",
            tokenizer.parent,
            found,
        )
    return found


def read_config(source: Path) -> Any:
    """The transformers config of a Hugging Face folder or a GGUF file.

    Raises:
        CheckpointError: no or damaged config, or quantised weights, which are not read.
    """
    return _gguf_config(source) if source.is_file() else _folder_config(source)


def _folder_config(folder: Path) -> Any:
    from transformers import AutoConfig

    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        declared = read_json(file)
        # Before transformers reads it: that would look for code where it doesn't know the family.
        families.family_named(declared.get("model_type"), folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # transformers' own code for a family computes with what it finds
        raise CheckpointError(f"{file}: not a model config ({reason(error)})") from error
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"{file}: quantization_config is set; give unquantised weights, or GGUF")
    return config


@lru_cache(maxsize=1)
def _gguf_config(file: Path) -> Any:
    from transformers import AutoConfig

    reader = open_gguf(file)
    field = reader.get_field("general.architecture")
    name = str(field.contents()) if field else ""
    families.family_named(name, file)
    if any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):
        raise CheckpointError(
            f"{file}: RoPE scaling stored as a tensor (rope_freqs) is not read from GGUF; use the Hugging Face folder"
        )
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # transformers computes with what it finds
        raise CheckpointError(f"{file}: its metadata is not a model's ({reason(error)})") from error
    config.architectures = [f"{name.capitalize()}ForCausalLM"]
    return config


def _write_gguf_metadata(file: Path, destination: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    config = _gguf_config(file)
    config.dtype = torch.float32
    config.save_pretrained(destination)
    GenerationConfig.from_model_config(config).save_pretrained(destination)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    tokenizer.save_pretrained(destination)
