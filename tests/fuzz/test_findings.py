"""What fuzzing has found and was mended, each as small as it gets."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest

from megatron_aligndistil.checkpoint import index, locate, manifest
from megatron_aligndistil.checkpoint.adapter_config import PEFT_CONFIG
from megatron_aligndistil.config.compose import load_config
from megatron_aligndistil.data.chat import ChatFormat
from megatron_aligndistil.data.records import records_of
from megatron_aligndistil.data.sources import Source, read_row
from megatron_aligndistil.data.tokenize import LengthPolicy, tokenize
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.errors import CheckpointError, ConfigError, DataError
from megatron_aligndistil.models import families
from megatron_aligndistil.types import Record
from tests.fuzz.models import write_peft
from tests.integration.program import write_model
from tests.tiny_models import tiny_config

ONE_LINE = r"\A[^\n]{0,1000}\Z"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", seed=1)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_row_that_python_cannot_hold(text) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*correct or remove the line"):
        read_row(Source("rows.jsonl", Path("rows.jsonl")), {"line": 7, "text": text}, 0)


@pytest.mark.parametrize("messages", [1.5, {"role": "user"}, "hello", True])
def test_messages_that_are_no_list(messages) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: messages is .*a list of messages"):
        records_of({"messages": messages}, "rows.jsonl:7", "prompt")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% break %}", "'break' outside loop"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ messages[0].content }}{% if messages[1:] %}{{ messages[1].content }}{{ end }}{% endif %}", "end token"),
    ],
)
def test_a_template_that_fails_as_a_program_does(model, template, said) -> None:
    tokenizer = load_tokenizer(str(model))
    # The probe of the end token is ended; what is asked is not.
    tokenizer.chat_template = template.replace("{{ end }}", "{% if 'Zebra7' in messages[1].content %}<eos>{% endif %}")
    with pytest.raises(DataError, match=rf"chat template .*{said}"):
        tokenize([Record("f:1", ({"role": "user", "content": "a"},), ("b",))], ChatFormat(tokenizer), POLICY)


POLICY = LengthPolicy(16, 32, "truncate_left", "truncate_right")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a place in the memo that would make it 32 GiB
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",  # a frame
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # bytes
        pickle.dumps([]),
    ],
)
def test_an_index_that_asks_for_memory(tmp_path, data) -> None:
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"\.metadata: not a checkpoint's index"):
        index.read_index(tmp_path)


@pytest.mark.parametrize("name", ["/dev/zero", "../../other", "", "a\0b"])
def test_a_manifest_that_sends_elsewhere(tmp_path, name) -> None:
    files = {name: {"bytes": 0, "sha256": "0"}}
    content = {"format": 1, "sha256": manifest._digest(files), "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged, .*is not a file of the checkpoint"):
        manifest.read_manifest(tmp_path)


def test_adapters_over_each_other(model, tmp_path) -> None:
    for own, other in (("a", "b"), ("b", "a")):
        folder = write_peft(model, tmp_path / own)
        config = json.loads((folder / PEFT_CONFIG).read_text())
        (folder / PEFT_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / other)}))
    with pytest.raises(CheckpointError, match="an adapter over itself"):
        locate.read_architecture(tmp_path / "a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0),
        ("hidden_size", 2**40),
        ("vocab_size", -1),
        ("rms_norm_eps", float("nan")),
        ("num_key_value_heads", 3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": [1]}),
    ],
)
def test_a_config_of_no_model(key, value) -> None:
    config = tiny_config("llama-tied")
    object.__setattr__(config, key, value)  # past transformers' own checks, which let much through
    with pytest.raises(CheckpointError, match=ONE_LINE):
        families.architecture_of(config)


def test_a_pickle_is_not_explained_how_to_run(model, tmp_path) -> None:
    """Torch's message about a refused pickle recommends reading it without the protection."""
    folder = Path(shutil.copytree(model, tmp_path / "weights"))
    (folder / "x").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match=r"x is bad \((?!.*weights_only)[^\n]*\)\Z"):
        index._check_plain((folder / "x").read_bytes(), "x is bad")


@pytest.mark.parametrize(
    "text",
    ["5", "defaults: [dpo, _self_]\nmodel: &m {data: *m}", "defaults: [dpo, _self_]\nx: " + "[" * 3000, "!!set {a}"],
)
def test_a_yaml_that_is_no_mapping_or_has_no_end(tmp_path, text) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=ONE_LINE) as raised:
        load_config("own", [], tmp_path)
    assert "own" in str(raised.value)
