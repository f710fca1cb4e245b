"""Models by content: the same elsewhere is the same, and whatever changes an answer makes another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_aligndistil.checkpoint.adapter_config import STATE_KEY
from megatron_aligndistil.checkpoint.identity import content_of
from megatron_aligndistil.checkpoint.locate import FORMAT, METADATA, STATE
from megatron_aligndistil.checkpoint.manifest import MANIFEST
from megatron_aligndistil.errors import CheckpointError
from tests.integration.program import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("identity") / "model", 0)


def test_a_copy_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("no part of it")
    assert content_of(copy) == content_of(model)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_every_file_that_answers_depend_on_counts(model: Path, tmp_path: Path, file: str) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    (other / file).write_bytes((other / file).read_bytes() + b" ")
    assert content_of(other) != content_of(model)


def test_a_megatron_checkpoint_is_its_manifest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = [run / "checkpoints" / f"step_{step}" for step in (1, 2)]
    for step, folder in enumerate(steps):
        (folder / "weights").mkdir(parents=True)
        (folder / MANIFEST).write_text(json.dumps({"step": step}))
        (folder / STATE).write_text(json.dumps({"format": FORMAT, "step": step}))
    assert content_of(run) == content_of(steps[1]) != content_of(steps[0])


def test_a_runs_adapter_counts_with_its_base(model: Path, tmp_path: Path) -> None:
    base, adapter = shutil.copytree(model, tmp_path / "base"), tmp_path / "adapter"
    (adapter / "weights").mkdir(parents=True)
    shutil.copytree(model, adapter / METADATA)
    (adapter / MANIFEST).write_text("{}")
    entry = {"rank": 4, "alpha": 8, "targets": ["attention_qkv"], "base": str(base)}
    (adapter / STATE).write_text(json.dumps({"format": FORMAT, "step": 1, STATE_KEY: entry}))
    before = content_of(adapter)
    (base / "model.safetensors").write_bytes(b"others")
    assert content_of(adapter) != before


def test_an_adapter_counts_with_its_base(model: Path, tmp_path: Path) -> None:
    base, adapter = shutil.copytree(model, tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    side = {"lora_A": torch.ones(4, 32), "lora_B": torch.ones(32, 4)}
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{layer}.{n}.weight": own for n, own in side.items()}, adapter / "adapter_model.safetensors")
    before = content_of(adapter)
    (base / "model.safetensors").write_bytes(b"others")
    assert content_of(adapter) != before


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        content_of(tmp_path / "nowhere")
