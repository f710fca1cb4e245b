"""Reward models and critics: scores are transformers', gradients a dense float64 model's, in every layout."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_aligndistil.certificate import dense_model
from megatron_aligndistil.certificate.dense_model import Weights
from megatron_aligndistil.certificate.models import InMemory, World, architecture_for
from megatron_aligndistil.checkpoint.hf_import import load_hf
from megatron_aligndistil.checkpoint.locate import read_architecture
from megatron_aligndistil.checkpoint.receipt import probe_batch
from megatron_aligndistil.checkpoint.weights import load_weights, model_state
from megatron_aligndistil.config.base_schema import OptimConfig
from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.gathering import hf_tensors
from megatron_aligndistil.models.heads import ScalarProjection, project
from megatron_aligndistil.models.policy import HiddenStateModel, ModelSettings, build_chunks
from megatron_aligndistil.parallel import groups, schedule
from megatron_aligndistil.parallel.setup import Layout, initialize
from megatron_aligndistil.trainer.optimizer import prepare, wrap
from megatron_aligndistil.types import Batch, LossOutput
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_reward_model

SP2 = Layout(tensor=2, sequence_parallel=True)
TP2_PP2 = Layout(tensor=2, pipeline=2)
VARIANTS = ("llama3-rope", "qwen2", "qwen3-no-groups")
ROWS, LENGTH = 4, 48


def tokens_of(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size - 1, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))  # no padding


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {variant: save_tiny_reward_model(folder, variant) for variant in VARIANTS}


def scores_of(models: dict[str, Path], layout: Layout) -> dict[str, list[Tensor]]:
    """What a frozen model keeps of its last tokens, [1] a micro-batch."""
    initialize(layout, seed=0, accelerator="cpu")
    found = {}
    for variant, path in models.items():
        architecture = read_architecture(path)
        assert architecture.scalar_head and not architecture.tied_embeddings
        chunks = build_chunks(architecture, ModelSettings(layout, torch.float32, 128, 128, False))
        assert not any("output_layer" in name for chunk in chunks for name, _ in chunk.named_parameters())
        load_weights(chunks, path)
        model = FrozenModel(chunks, offload=True)
        assert model.head is None
        batches = [probe_batch(row[None]) for row in tokens_of(architecture.vocab_size)]
        found[variant] = model.run(batches, lambda projection, batch: projection.values_BS[:, -1])
    return found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tensor=2),
        SP2,
        Layout(pipeline=2),
        Layout(pipeline=2, virtual_pipeline=2),
        TP2_PP2,
        Layout(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True),
        Layout(context=2),
    ],
    ids=str,
)
def test_scores_are_those_of_transformers(models, layout):
    from transformers import AutoModelForSequenceClassification

    ranks = run_ranks(layout.replica_size, scores_of, models, layout)
    for variant, path in models.items():
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = model(tokens_of(model.config.vocab_size)).logits[:, 0]
        assert expected.abs().max() > 0.5
        found = [torch.cat(rank[variant]) for rank in ranks if rank[variant]]
        # Every tensor and context rank of the last stage has them.
        assert len(found) == layout.replica_size // layout.pipeline
        differences = [float((scores - expected).abs().max()) for scores in found]
        print(f"{variant} {layout}: {max(differences):.1e}")
        assert max(differences) <= 2e-5


GRADIENT_CASES = [
    (Layout(), 1, {}),
    (Layout(tensor=2), 2, {"batching": "packed"}),
    (SP2, 2, {}),
    (Layout(pipeline=2), 2, {}),
    (Layout(pipeline=2, virtual_pipeline=2), 2, {}),
    (Layout(), 2, {"distributed": True}),
    (TP2_PP2, 4, {}),
    (Layout(tensor=2, pipeline=2, sequence_parallel=True), 4, {"batching": "packed"}),
    (SP2, 4, {"distributed": True}),
    (Layout(context=2), 2, {}),
]


def world_for(layout: Layout) -> World:
    return World(architecture_for(layout, tied=False).with_scalar_head())


def weights_of(tokens: Tensor, positions: Tensor) -> Tensor:
    return torch.sin(0.7 * tokens.double() + 0.3 * positions.double())


def weighted_sum(projection: ScalarProjection, batch: Batch) -> LossOutput:
    """Σ w·value over every real position, with weights that tell positions and tokens apart."""
    real = batch.sequence_ids >= 0
    weights = weights_of(batch.tokens, batch.position_ids)
    assert projection.values_BS.shape == batch.tokens.shape
    return LossOutput((weights * projection.values_BS)[real].sum(), int(real.sum()))


@functools.cache
def reference(layout: Layout) -> Weights:
    """Gradients of the world's mean by the dense model, whose head of the vocabulary has one entry."""
    world = world_for(layout)
    weights = {name: weight.clone().requires_grad_() for name, weight in world.weights("policy").items()}
    dense = {"lm_head.weight" if name == "score.weight" else name: weight for name, weight in weights.items()}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in world.singles:
        tokens = example.sequences[0].tokens
        values = dense_model.logits(dense, world.shape, tokens)[:, 0]
        total = total + (weights_of(torch.from_numpy(tokens), torch.arange(len(tokens))) * values).sum()
        count += len(tokens)
    return dense_model.gradients(total / count, weights)


def batches_of(world: World, layout: Layout, batching: str = "bucketed") -> list[Batch]:
    how = MicroBatching(
        batching=batching,
        micro_batch_size=1 if batching == "packed" else 2,
        pack_length=80,
        pad_multiple=2 * layout.context * layout.tensor,
        n_multiple=layout.pipeline,
    )
    return micro_batches(world.singles, groups.data().rank, groups.data().size, how)


def model_of(world: World, layout: Layout, dtype: torch.dtype) -> list[HiddenStateModel]:
    chunks = build_chunks(world.architecture, ModelSettings(layout, dtype, 64, 128, False))
    load_hf(chunks, InMemory(world.weights("policy")))
    return chunks


def run_step(chunks: list[HiddenStateModel], wrapped: list, batches: list[Batch]) -> None:
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    schedule.forward_backward(
        wrapped,
        batches,
        lambda hidden, index: weighted_sum(project(chunks[-1], hidden, batches[index]), batches[index]),
    )


def gradients_of(layout: Layout, batching: str = "bucketed", distributed: bool = False) -> Weights:
    initialize(layout, seed=0, accelerator="cpu")
    torch.set_default_dtype(torch.float64)  # Megatron-Core divides by the count in it
    world = world_for(layout)
    chunks = model_of(world, layout, torch.float64)
    wrapped = wrap(chunks, distributed)
    run_step(chunks, wrapped, batches_of(world, layout, batching))
    if distributed:  # each data-parallel rank has its own part of the sums
        for bucket in (bucket for chunk in wrapped for buffer in chunk.buffers for bucket in buffer.buckets):
            axis = groups.data()
            part = bucket.grad_data.chunk(axis.size)[axis.rank].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, part, group=axis.group)
    return {name: tensor.clone() for name, tensor in hf_tensors(chunks, lambda parameter: parameter.main_grad)}


def keyword_call(layout: Layout, options: dict) -> Weights:
    return gradients_of(layout, **options)


@pytest.mark.parametrize(("layout", "world", "options"), GRADIENT_CASES, ids=str)
def test_gradients_are_those_of_the_dense_model(layout, world, options):
    found = run_ranks(world, keyword_call, layout, options)[0]
    expected = reference(layout)
    assert found.keys() == expected.keys() and "score.weight" in found
    errors = {name: float((found[name] - g).norm() / g.norm()) for name, g in expected.items()}
    print(f"{layout} x{world} {options}: {max(errors.values()):.1e}")
    assert max(errors.values()) <= 1e-10, errors


def optimizer_step(layout: Layout, name: str) -> tuple[float, Tensor | None]:
    """The gradient norm that the optimizer sees, and the head after its step."""
    initialize(layout, seed=0, accelerator="cpu")
    world = world_for(layout)
    chunks = model_of(world, layout, torch.float32)
    trained = prepare(chunks, OptimConfig(name=name, lr=1e-3), clip_grad=1.0, total_steps=2)
    run_step(chunks, trained.wrapped, batches_of(world, layout))
    trained.scheduler.step(1)
    done, norm, _ = trained.optimizer.step()
    assert done
    state = model_state(chunks)
    flat = {f"{part}.{key}": tensor for part, tensors in state.items() for key, tensor in tensors.items()}
    assert any(key.endswith("score_head.weight") for key in flat) is groups.is_last_stage()
    trained.optimizer.sharded_state_dict(flat, metadata={"distrib_optim_sharding_type": "fully_reshardable"})
    head = chunks[-1].score_head.weight.detach().clone() if groups.is_last_stage() else None
    return float(norm), head


@pytest.mark.parametrize(
    ("layout", "world", "name"),
    [
        (Layout(), 1, "adam"),
        (SP2, 2, "adam"),
        (TP2_PP2, 4, "distributed_fused_adam"),
        (SP2, 4, "distributed_fused_adam"),
    ],
    ids=str,
)
def test_the_optimizer_counts_the_head_once_and_keeps_its_copies_equal(layout, world, name):
    ranks = run_ranks(world, optimizer_step, layout, name)
    expected = math.hypot(*(float(gradient.norm()) for gradient in reference(layout).values()))
    assert all(norm == pytest.approx(expected, rel=1e-5) for norm, _ in ranks)
    heads = [head for _, head in ranks if head is not None]
    before = world_for(layout).weights("policy")["score.weight"].float()
    assert len(heads) == world // layout.pipeline
    assert all(torch.equal(head, heads[0]) for head in heads) and not torch.equal(heads[0], before)
