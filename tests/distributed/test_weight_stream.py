"""The policy's weights on every rank, a bucket at a time: those of the Hugging Face folder bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_aligndistil.checkpoint.locate import read_architecture
from megatron_aligndistil.checkpoint.sources import SafetensorsFolder
from megatron_aligndistil.checkpoint.weights import load_weights
from megatron_aligndistil.models import families
from megatron_aligndistil.models.families.table import hf_shapes
from megatron_aligndistil.models.policy import ModelSettings, build_chunks
from megatron_aligndistil.parallel.setup import Layout, initialize
from megatron_aligndistil.rollout.weight_stream import weight_buckets
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny

MODELS = ("qwen2", "llama-odd-vocab", "qwen3")  # a tied head, an untied one, norms of queries and keys
TINY, SOME, ALL = 1, 20_000, 2**30  # each tensor alone; a few together; one bucket
CASES = [
    (Layout(), 1, torch.float32),
    (Layout(), 2, torch.float32),
    (Layout(tensor=2), 2, torch.float32),
    (Layout(tensor=2, sequence_parallel=True), 4, torch.float32),
    (Layout(pipeline=2), 2, torch.float32),
    (Layout(pipeline=2, virtual_pipeline=2), 2, torch.float32),
    (Layout(tensor=2, pipeline=2), 4, torch.bfloat16),  # cast on the way
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny(folder, name) for name in MODELS]


def streamed(models: list[Path], layout: Layout, dtype: torch.dtype) -> list[list[list[dict[str, Tensor]]]]:
    """Copies of the buckets, by model and bucket size."""
    initialize(layout, seed=0, accelerator="cpu")
    found = []
    for path in models:
        chunks = build_chunks(read_architecture(path), ModelSettings(layout, torch.float32, 64, 128, False))
        load_weights(chunks, path)
        sizes = []
        for size in (TINY, SOME, ALL):
            buckets, places = [], set()
            for bucket in weight_buckets(chunks, dtype, size):
                places |= {tensor.untyped_storage().data_ptr() for tensor in bucket.values()}
                buckets.append({name: tensor.clone() for name, tensor in bucket.items()})
            assert len(places) == 1, "more than one buffer"
            sizes.append(buckets)
        found.append(sizes)
    return found


def weights_of(path: Path) -> dict[str, Tensor]:
    source, architecture = SafetensorsFolder(path), read_architecture(path)
    shapes = hf_shapes(families.table_of(architecture), architecture)
    return {name: source.part(name).take(0, 0, shape[0]) for name, shape in shapes.items()}


@pytest.mark.parametrize(("layout", "world", "dtype"), CASES, ids=str)
def test_every_rank_gets_the_weights(models, layout, world, dtype):
    ranks = run_ranks(world, streamed, models, layout, dtype, timeout_seconds=120)
    for index, path in enumerate(models):
        expected = {name: weight.to(dtype) for name, weight in weights_of(path).items()}
        for rank in ranks:
            for size, buckets in zip((TINY, SOME, ALL), rank[index], strict=True):
                whole = {name: tensor for bucket in buckets for name, tensor in bucket.items()}
                assert list(whole) == list(expected) and sum(map(len, buckets)) == len(expected)
                assert all(torch.equal(whole[name], expected[name]) for name in expected)
                for bucket in buckets:
                    assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket.values()) <= size
            tiny, some, one = (len(buckets) for buckets in rank[index])
            assert tiny == len(expected) > some > one == 1
