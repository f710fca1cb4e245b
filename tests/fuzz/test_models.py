"""Model folders and files in others' forms: every tensor is read, or one line names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from megatron_aligndistil.checkpoint import locate
from megatron_aligndistil.checkpoint.hf_import import check_tensors
from megatron_aligndistil.checkpoint.metadata import copy_metadata, read_config
from megatron_aligndistil.checkpoint.sources import SafetensorsFolder
from megatron_aligndistil.checkpoint.weights import open_source
from megatron_aligndistil.models import families
from tests.fuzz.models import write_gguf, write_shards
from tests.fuzz.mutations import junk, spoiled_bytes, spoiled_json, spoiled_text_file
from tests.fuzz.reader import Reader
from tests.integration.program import write_model
from tests.tiny_models import save_tiny, save_tiny_reward_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return write_model(folder / "model", seed=1)


def read_everything(path: Path) -> None:
    """What loading reads: the architecture, and every tensor as a whole."""
    architecture = locate.read_architecture(path)
    source = open_source(path)
    check_tensors(source, architecture)
    for name, shape in source.shapes.items():
        assert tuple(source.part(name).take(0, 0, shape[0] if shape else 0).shape) == shape


def test_configs(record, folder, tmp_path) -> None:
    reader = Reader("config.json")
    models = [save_tiny(folder, name) for name in ("llama3-rope", "qwen2-untied", "qwen3")]
    models.append(save_tiny_reward_model(folder, "llama-tied"))
    samples = [json.loads((model / "config.json").read_text()) for model in models]
    samples[0] |= {"layer_types": ["full_attention"] * 4, "quantization_config": None, "id2label": {"0": "x"}}
    keys = st.sampled_from(sorted({key for sample in samples for key in sample}))
    one_value = st.tuples(st.sampled_from(samples), keys, junk()).map(
        lambda drawn: json.dumps({**drawn[0], drawn[1]: drawn[2]}).encode()
    )

    def check(content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        architecture = reader.read(lambda: families.architecture_of(read_config(tmp_path)), tmp_path)
        if not isinstance(architecture, str):
            assert architecture.num_layers >= 1 and architecture.hidden_size >= 1 and architecture.vocab_size >= 1

    record(reader.fuzz(spoiled_text_file(samples) | one_value, check))


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and what follows it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text: str, body: bytes) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + body


def test_safetensors(record, model, tmp_path) -> None:
    reader, file = Reader("safetensors"), tmp_path / "model.safetensors"
    shutil.copy(model / "config.json", tmp_path)
    sound = (model / file.name).read_bytes()
    entries, body = header(sound)
    headers = spoiled_json([entries]).map(lambda text: with_header(text, body))
    damaged = spoiled_bytes([sound], 8) | spoiled_bytes([sound], len(sound) - len(body))

    def check(content: bytes) -> None:
        file.write_bytes(content)
        reader.read(lambda: read_everything(tmp_path), tmp_path)

    record(reader.fuzz(headers | damaged, check))


def test_safetensors_indices(record, model, tmp_path) -> None:
    reader = Reader("safetensors index")
    folder = write_shards(model, tmp_path / "shards")
    outside = tmp_path / "secret.safetensors"
    shutil.copy(folder / "model-00001-of-00002.safetensors", outside)
    sound = json.loads((folder / INDEX).read_text())
    names = ("../secret.safetensors", str(outside), "..", "", ".", "config.json", "/dev/stdin", "a/b", "\x00", INDEX)
    paths = st.tuples(st.sampled_from(sorted(sound["weight_map"])), st.sampled_from(names)).map(
        lambda drawn: json.dumps({"weight_map": {**sound["weight_map"], drawn[0]: drawn[1]}}).encode()
    )

    def check(content: bytes) -> None:
        (folder / INDEX).write_bytes(content)
        reader.read(lambda: read_everything(folder), folder)

    record(reader.fuzz(spoiled_text_file([sound]) | paths, check))


def test_an_index_names_no_file_outside_its_folder(model, tmp_path) -> None:
    folder = write_shards(model, tmp_path / "shards")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        shutil.move(folder / name, tmp_path)
    text = (folder / INDEX).read_text().replace("model-0", "../model-0")
    (folder / INDEX).write_text(text)
    with pytest.raises(Exception, match=f"{folder}.*model-0000"):
        SafetensorsFolder(folder)


def test_gguf(record, model, tmp_path) -> None:
    reader = Reader("GGUF")
    sound = write_gguf(model, tmp_path / "sound.gguf").read_bytes()

    def check(content: bytes) -> None:
        file = tmp_path / f"{reader.tally.inputs}.gguf"  # another name each time: what is known of a file is kept
        file.write_bytes(content)
        reader.read(lambda: read_everything(file), tmp_path)
        file.unlink()

    record(reader.fuzz(spoiled_bytes([sound], 7000) | spoiled_bytes([sound], 900) | st.binary(max_size=60), check))


def test_metadata_files(record, model, tmp_path) -> None:
    """What is carried over beside the weights, and changed for another dtype or a scalar head on the way."""
    reader, folder, output = Reader("metadata files"), tmp_path / "model", tmp_path / "output"
    names = ("config.json", "tokenizer_config.json", "generation_config.json")
    files = {name: json.loads((model / name).read_text()) for name in names}
    edits = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), spoiled_text_file([files[name]])))

    def check(drawn: tuple[str, bytes]) -> None:
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / drawn[0]).write_bytes(drawn[1])
        try:
            reader.read(lambda: (read_config(folder), copy_metadata(folder, output, torch.bfloat16, True)), tmp_path)
        finally:
            shutil.rmtree(folder)
            shutil.rmtree(output, ignore_errors=True)

    record(reader.fuzz(edits, check))
