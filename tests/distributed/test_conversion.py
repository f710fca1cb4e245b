"""Conversion between Hugging Face and Megatron-Core: bit-identical round trips through different layouts."""

from __future__ import annotations

import hashlib
import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_aligndistil.checkpoint.convert import ConvertRequest, convert
from megatron_aligndistil.checkpoint.locate import kind_of, read_architecture
from megatron_aligndistil.checkpoint.weights import load_weights
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.gathering import hf_tensors
from megatron_aligndistil.models.policy import ModelSettings, build_chunks
from megatron_aligndistil.parallel.setup import Layout, initialize
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny

# A tied head over two stages, an odd vocabulary with biases, q/k norms: everything that a layout can get wrong.
MODELS = {"qwen2": torch.float32, "qwen2-untied": torch.bfloat16, "llama-tied": torch.float16, "qwen3": torch.float32}
TP2_PP2, TP2, PP2 = Layout(tensor=2, pipeline=2), Layout(tensor=2), Layout(pipeline=2)
PP2_VPP2 = Layout(pipeline=2, virtual_pipeline=2)
ONE = Layout()


def convert_all(requests: list[ConvertRequest]) -> list[dict[str, str] | None]:
    """The tensors' hashes on rank 0, from conversions in one layout, unverified."""
    initialize(requests[0].layout, seed=0, accelerator="cpu")
    return [convert(request) for request in requests]  # type: ignore[misc]


def run_conversions(sources: dict[str, Path], target: Path, layout: Layout) -> dict[str, Path]:
    requests = [ConvertRequest(path, target / name, verify=False, layout=layout) for name, path in sources.items()]
    run_ranks(layout.replica_size, convert_all, requests, timeout_seconds=250)
    return {name: target / name for name in sources}


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Name → (dtype, shape, SHA-256), read without any code of the package."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).hexdigest())
    return found


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    paths = {name: save_tiny(folder, name, dtype, max_shard_size="40KB") for name, dtype in MODELS.items()}
    for path in paths.values():
        (path / "tokenizer_config.json").write_text('{"chat_template": null}\n')
        (path / "chat_template.jinja").write_text("{{ messages }}\n")
    return paths


@pytest.mark.parametrize(("there", "back"), [(TP2_PP2, PP2_VPP2), (PP2_VPP2, TP2), (ONE, TP2_PP2)], ids=str)
def test_round_trip_is_bit_identical(originals, tmp_path, there, back):
    megatron = run_conversions(originals, tmp_path / "megatron", there)
    assert all(kind_of(path) == "megatron" for path in megatron.values())
    returned = run_conversions(megatron, tmp_path / "hf", back)
    for name, original in originals.items():
        expected, found = tensors_of(original), tensors_of(returned[name])
        assert found == expected, f"{name}: {sorted(k for k in expected if found.get(k) != expected[k])}"
        for file in ("config.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (returned[name] / file).read_bytes() == (original / file).read_bytes()
    assert not list(tmp_path.rglob(".*.partial"))


def gathered(path: Path, architecture: Architecture, layout: Layout) -> dict[str, torch.Tensor]:
    """What ``hf_tensors`` yields of a stand-in for gradients: each parameter's own value, doubled, in float64."""
    initialize(layout, seed=0, accelerator="cpu")
    chunks = build_chunks(architecture, ModelSettings(layout, torch.float32, 64, 128, False))
    load_weights(chunks, path)
    return {name: tensor.clone() for name, tensor in hf_tensors(chunks, lambda parameter: parameter.data.double() * 2)}


def test_gathering_picks_the_value_asked_for_and_comes_out_on_rank_0_alone(originals):
    path = originals["qwen2"]
    architecture = read_architecture(path)
    # Two replicas of TP=2: only the first one takes part.
    ranks = run_ranks(4, gathered, path, architecture, TP2)
    assert ranks[1] == ranks[2] == ranks[3] == {}
    expected: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            expected |= {name: handle.get_tensor(name).double() * 2 for name in handle.keys()}  # noqa: SIM118
    assert ranks[0].keys() == expected.keys()
    assert all(torch.equal(ranks[0][name], tensor) for name, tensor in expected.items())


def verified(request: ConvertRequest) -> tuple[bool, float] | None:
    initialize(request.layout, seed=0, accelerator="cpu")
    receipt = convert(request)
    return None if receipt is None else (receipt.passed, receipt.max_logit_difference)


@pytest.mark.parametrize("layout", [ONE, TP2_PP2], ids=str)
def test_the_receipt_holds_the_logits_and_every_tensor(originals, tmp_path, layout):
    output = tmp_path / "megatron"
    request = ConvertRequest(originals["qwen2-untied"], output, layout=layout)
    results = run_ranks(layout.replica_size, verified, request, timeout_seconds=250)
    passed, difference = results[0]
    assert passed and difference <= 1e-4 and all(result is None for result in results[1:])
    receipt = json.loads((output / "receipt.json").read_text())
    expected = {name: digest for name, (_, _, digest) in tensors_of(originals["qwen2-untied"]).items()}
    assert receipt["passed"] and receipt["tensors"] == expected and receipt["dtype"] == "bfloat16"


def on_a_full_disk(request: ConvertRequest, full_ranks: list[int]) -> str:
    """The error of a conversion in which some ranks may write no more than 5 kB a file."""
    initialize(request.layout, seed=0, accelerator="cpu")
    if dist.get_rank() in full_ranks:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        convert(request)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    return "no error"


@pytest.mark.parametrize(
    ("to", "layout", "full_ranks"),
    [("hf", ONE, [0]), ("hf", TP2_PP2, [0]), ("megatron", ONE, [0]), ("megatron", TP2, [0, 1]), ("megatron", TP2, [1])],
    ids=str,
)
def test_a_full_disk_is_one_line_on_every_rank_and_leaves_nothing(originals, tmp_path, to, layout, full_ranks):
    output = tmp_path / "output"
    request = ConvertRequest(originals["llama-tied"], output, to=to, verify=False, layout=layout)
    for error in run_ranks(layout.replica_size, on_a_full_disk, request, full_ranks, timeout_seconds=60):
        assert "cannot write" in error and str(tmp_path) in error and "\n" not in error, error
        # Which of many symptoms the library shows is chance; the free space is what tells the user.
        assert ("too large" if to == "hf" else "GiB are free there") in error, error
    assert list(tmp_path.iterdir()) == []
