"""Reward models in files: converted both ways, started from language models, told apart from them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_aligndistil.checkpoint.convert import ConvertRequest
from megatron_aligndistil.checkpoint.hf_export import export_hf
from megatron_aligndistil.checkpoint.locate import kind_of, metadata_source, read_architecture
from megatron_aligndistil.checkpoint.metadata import copy_metadata
from megatron_aligndistil.checkpoint.sources import SafetensorsFolder
from megatron_aligndistil.checkpoint.weights import load_weights
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.gathering import hf_tensors
from megatron_aligndistil.models.policy import HiddenStateModel, ModelSettings, build_chunks
from megatron_aligndistil.parallel.setup import Layout, initialize
from tests.distributed.harness import run_ranks
from tests.distributed.test_conversion import ONE, PP2, PP2_VPP2, TP2, TP2_PP2, convert_all, tensors_of, verified
from tests.tiny_models import save_tiny, save_tiny_reward_model, tiny_config
from tests.unit.checkpoint.refusals import refusal

REWARD_MODELS = {"qwen2": torch.float32, "llama-odd-vocab": torch.bfloat16, "qwen3": torch.float32}
LANGUAGE_MODELS = ("qwen2", "llama-odd-vocab")  # a tied head and another one


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    return {name: save_tiny_reward_model(folder, name, dtype) for name, dtype in REWARD_MODELS.items()}


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    return {name: save_tiny(folder, name) for name in LANGUAGE_MODELS}


@pytest.fixture(scope="module")
def checkpoints(reward_models, language_models, tmp_path_factory):
    """Megatron checkpoints: "reward" and "language"."""
    folder = tmp_path_factory.mktemp("megatron")
    sources = {"reward": reward_models["qwen2"], "language": language_models["qwen2"]}
    requests = [ConvertRequest(path, folder / name, verify=False, layout=TP2) for name, path in sources.items()]
    run_ranks(2, convert_all, requests)
    return {name: folder / name for name in sources}


@pytest.mark.parametrize(("there", "back"), [(TP2_PP2, PP2_VPP2), (ONE, TP2)], ids=str)
def test_round_trip_is_bit_identical(reward_models, tmp_path, there, back):
    inputs = reward_models
    for form, layout in (("megatron", there), ("hf", back)):
        requests = [
            ConvertRequest(path, tmp_path / form / name, verify=False, layout=layout) for name, path in inputs.items()
        ]
        run_ranks(layout.replica_size, convert_all, requests, timeout_seconds=250)
        inputs = {name: tmp_path / form / name for name in inputs}
        assert all(read_architecture(path).scalar_head for path in inputs.values())
    for name, original in reward_models.items():
        assert tensors_of(inputs[name]) == tensors_of(original)
        assert (inputs[name] / "config.json").read_bytes() == (original / "config.json").read_bytes()


@pytest.mark.parametrize("layout", [ONE, TP2_PP2], ids=str)
def test_the_receipt_compares_scores(reward_models, tmp_path, layout):
    source = reward_models["qwen2"]
    for form, path in (("megatron", source), ("hf", tmp_path / "megatron")):
        [result, *_] = run_ranks(
            layout.replica_size, verified, ConvertRequest(path, tmp_path / form, layout=layout), timeout_seconds=250
        )
        passed, difference = result
        assert passed and difference <= 2e-5
        receipt = json.loads((tmp_path / form / "receipt.json").read_text())
        assert receipt["compared"] == "scores" and receipt["max_logit"] > 0.5
        assert "score.weight" in receipt["tensors"] and not receipt["differing"]


@contextmanager
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_aligndistil.checkpoint")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def scalar_chunks(path: Path, layout: Layout) -> list[HiddenStateModel]:
    architecture = read_architecture(path).with_scalar_head()
    return build_chunks(architecture, ModelSettings(layout, torch.float32, 64, 128, False))


def started(paths: list[Path], layout: Layout) -> list[tuple[dict[str, Tensor], Tensor | None]]:
    """The tensors of scalar models that start from ``paths`` (rank 0), and this rank's copy of the head."""
    initialize(layout, seed=0, accelerator="cpu")
    found = []
    for path in paths:
        chunks = scalar_chunks(path, layout)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        with log_lines() as lines:
            load_weights(chunks, path)
        assert len(lines) == 1 and str(path) in lines[0] and "scalar head is drawn" in lines[0]
        head = chunks[-1].score_head.weight.detach().clone() if hasattr(chunks[-1], "score_head") else None
        found.append(({name: tensor.clone() for name, tensor in hf_tensors(chunks)}, head))
    return found


@pytest.mark.parametrize("layout", [ONE, TP2, PP2, PP2_VPP2, TP2_PP2], ids=str)
def test_a_language_model_starts_a_reward_model(language_models, checkpoints, layout):
    paths = [*language_models.values(), checkpoints["language"]]
    originals = [*language_models.values(), language_models["qwen2"]]
    ranks = run_ranks(layout.replica_size, started, paths, layout)
    for index, original in enumerate(originals):
        source, (tensors, _) = SafetensorsFolder(original), ranks[0][index]
        head = tensors.pop("score.weight")
        assert tensors.keys() == source.shapes.keys() - {"lm_head.weight"}
        assert all(torch.equal(tensors[name], source.part(name).take(0, 0, len(tensors[name]))) for name in tensors)
        expected = torch.randn(1, 32, generator=torch.Generator().manual_seed(1234)) / 33**0.5
        assert torch.equal(head, expected)
        copies = [rank[index][1] for rank in ranks if rank[index][1] is not None]
        assert len(copies) == layout.tensor and all(torch.equal(copy, expected) for copy in copies)


def exported(path: Path, output: Path, layout: Layout) -> None:
    initialize(layout, seed=0, accelerator="cpu")
    chunks = scalar_chunks(path, layout)
    load_weights(chunks, path, head_seed=5)
    export_hf(chunks, metadata_source(path), output, torch.float32)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_started_from_a_language_model_is_read_by_transformers(language_models, tmp_path, name):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    run_ranks(2, exported, language_models[name], tmp_path / "reward", TP2)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_labels == 1 and model.config.architectures == [type(model).__name__]
    tokens = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(0))  # 0 is padding
    body = AutoModelForCausalLM.from_pretrained(language_models[name]).model
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(5)) / 33**0.5
    with torch.no_grad():
        found, expected = model(tokens).logits, body(tokens).last_hidden_state[:, -1] @ head.T
    assert (found - expected).abs().max() <= 1e-6
    assert kind_of(tmp_path / "reward") == "huggingface" and read_architecture(tmp_path / "reward").scalar_head


def refused(paths: list[Path], architecture_source: Path) -> list[str]:
    initialize(ONE, seed=0, accelerator="cpu")
    architecture = read_architecture(architecture_source)
    chunks = build_chunks(architecture, ModelSettings(ONE, torch.float32, 64, 128, False))
    errors = []
    for path in paths:
        try:
            load_weights(chunks, path)
        except CheckpointError as error:
            errors.append(str(error))
    return errors


def test_a_reward_model_is_not_a_language_model(reward_models, language_models, checkpoints):
    paths = [reward_models["qwen2"], checkpoints["reward"]]
    [errors] = run_ranks(1, refused, paths, language_models["qwen2"])
    assert len(errors) == 2
    for path, error in zip(paths, errors, strict=True):
        assert error.startswith(f"{path}: a reward model's weights") and "\n" not in error


def classifier_config(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    config = tiny_config("qwen2").to_dict() | {"architectures": ["Qwen2ForSequenceClassification"]} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    two = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    with refusal("qwen2", "num_labels=2"):
        read_architecture(classifier_config(tmp_path / "model", **two))


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"pad_token_id": 7, "eos_token_id": 2}, None, 7),
        ({"pad_token_id": None, "eos_token_id": [2, 3]}, None, 2),
        ({"pad_token_id": None, "eos_token_id": None}, None, 0),
        (
            {"pad_token_id": None, "eos_token_id": 2},
            {"pad_token": "<pad>", "added_tokens_decoder": {"2": {"content": "<end>"}, "9": {"content": "<pad>"}}},
            9,
        ),
    ],
)
def test_the_metadata_of_a_reward_model_names_a_padding_token(tmp_path, caplog, config, tokenizer, expected):
    source = classifier_config(tmp_path / "model", architectures=["Qwen2ForCausalLM"], **config)
    if tokenizer is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    copy_metadata(source, tmp_path / "copy", scalar_head=True)
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert written["pad_token_id"] == expected and written["num_labels"] == 1
    assert written["architectures"] == ["Qwen2ForSequenceClassification"] and not written["tie_word_embeddings"]
    assert ("also ends a sequence" in caplog.text) is (expected == 2)
    copy_metadata(tmp_path / "copy", tmp_path / "again", scalar_head=True)
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "copy" / "config.json").read_bytes()
    assert read_architecture(tmp_path / "again").scalar_head
