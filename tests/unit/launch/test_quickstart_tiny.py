"""The tiny model: its shape, its tokenizer, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_aligndistil.data.chat import ChatFormat, stop_token_ids
from megatron_aligndistil.launch import quickstart_tiny
from megatron_aligndistil.launch.quickstart_pairs import train_pairs
from megatron_aligndistil.launch.quickstart_recipe import TINY


def test_the_tiny_model_fits_its_layout_and_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart_tiny, "PRETRAIN_STEPS", 4)
    pairs = train_pairs(TINY.train_pairs, seed=2)
    quickstart_tiny.make_tiny_model(tmp_path, pairs, seed=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == "qwen2"
    assert 1e6 < model.num_parameters() < 3e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.num_key_value_heads % TINY.tensor_parallel == 0
    assert model.config.num_hidden_layers % TINY.pipeline_parallel == 0
    assert stop_token_ids(tokenizer) == [model.config.eos_token_id] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    chat = ChatFormat(tokenizer)
    for pair in pairs:
        prompt, (whole,) = chat.texts([{"role": "user", "content": pair.question}], [pair.chosen])
        (ids,) = chat.token_ids([whole])
        assert len(ids) <= TINY.sequence_length
        assert tokenizer.decode(ids) == whole and whole.startswith(prompt)
