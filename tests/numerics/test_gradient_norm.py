"""The gradient's norm, by which it is clipped, is the dense model's: shards count on every rank, copies once."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_aligndistil.algorithms.table import ALGORITHMS
from megatron_aligndistil.certificate.algorithms import ALGORITHM_CHECKS
from megatron_aligndistil.certificate.models import InMemory, World, architecture_for
from megatron_aligndistil.checkpoint.hf_import import load_hf
from megatron_aligndistil.config.base_schema import KernelConfig, OptimConfig
from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.models.heads import project
from megatron_aligndistil.models.policy import ModelSettings, build_chunks
from megatron_aligndistil.parallel import groups, schedule
from megatron_aligndistil.parallel.setup import Layout, initialize
from megatron_aligndistil.trainer.optimizer import prepare
from tests.distributed.harness import run_ranks

SP2 = Layout(tensor=2, sequence_parallel=True)
CHECK = ALGORITHM_CHECKS["sft"]
CASES = [
    (Layout(tensor=2), 2, "adam"),
    (SP2, 2, "adam"),
    (SP2, 4, "distributed_fused_adam"),
    (Layout(tensor=2, pipeline=2), 4, "adam"),
]


def norm_of(layout: Layout, tied: bool, optimizer: str) -> float:
    """What the optimizer says after a step of SFT in float32."""
    initialize(layout, seed=0, accelerator="cpu")
    world = World(architecture_for(layout, tied))
    chunks = build_chunks(world.architecture, ModelSettings(layout, torch.float32, 64, 8, False))
    load_hf(chunks, InMemory(world.weights("policy")))
    trained = prepare(chunks, OptimConfig(name=optimizer), clip_grad=1.0, total_steps=2)
    trained.zero_grad()
    batches = micro_batches(
        CHECK.examples(world),
        groups.data().rank,
        groups.data().size,
        MicroBatching(batching="bucketed", micro_batch_size=2, pack_length=80, pad_multiple=2, n_multiple=1),
    )
    loss = ALGORITHMS["sft"](CHECK.config(KernelConfig())).loss
    schedule.forward_backward(
        trained.wrapped,
        batches,
        lambda hidden, index: loss(project(chunks[-1], hidden, batches[index]), batches[index], None),
    )
    _, norm, _ = trained.optimizer.step()
    return float(norm)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("layout", "world", "optimizer"), CASES, ids=str)
def test_the_norm_is_the_dense_models(layout, world, optimizer, tied):
    _, gradients = CHECK.reference(World(architecture_for(layout, tied)))
    expected = math.hypot(*(float(gradient.norm()) for gradient in gradients.values()))
    assert run_ranks(world, norm_of, layout, tied, optimizer) == [pytest.approx(expected, rel=1e-5)] * world
