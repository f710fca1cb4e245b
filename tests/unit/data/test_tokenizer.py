"""Loading tokenizers, and telling them apart by what their ids mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_aligndistil.data.tokenizer import load_tokenizer, rendering_fingerprint, tokenizer_fingerprint
from megatron_aligndistil.errors import DataError


@pytest.mark.parametrize("name", ["base_tokenizer", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_a_saved_copy_is_the_same_tokenizer(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """SmolLM2's comes out of a GGUF file."""
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    copy = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer)
    text = "Hello  world, été 123"
    assert copy(text)["input_ids"] == tokenizer(text)["input_ids"] and copy.chat_template == tokenizer.chat_template


def test_models_with_other_vocabularies_differ(
    qwen: PreTrainedTokenizerBase, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert tokenizer_fingerprint(qwen) != tokenizer_fingerprint(base_tokenizer)


def test_a_template_or_eos_changes_the_rendering_only(base_tokenizer: PreTrainedTokenizerBase) -> None:
    same, rendering = tokenizer_fingerprint(base_tokenizer), rendering_fingerprint(base_tokenizer)
    base_tokenizer.chat_template = "x"
    with_template = rendering_fingerprint(base_tokenizer)
    base_tokenizer.eos_token = "<|turn|>"
    assert len({rendering, with_template, rendering_fingerprint(base_tokenizer)}) == 3
    assert tokenizer_fingerprint(base_tokenizer) == same
    base_tokenizer.add_tokens(["new word"])
    assert tokenizer_fingerprint(base_tokenizer) != same


def test_an_earlier_call_does_not_change_the_rendering(base_tokenizer: PreTrainedTokenizerBase) -> None:
    before = rendering_fingerprint(base_tokenizer)
    base_tokenizer.backend_tokenizer.enable_truncation(5)
    assert rendering_fingerprint(base_tokenizer) == before


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model folder"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"holds no tokenizer \(tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{ damaged")
    with pytest.raises(DataError, match="tokenizer not loaded"):
        load_tokenizer(str(tmp_path))
