"""One optimizer step's loss and gradient on real Megatron-Core, in any layout, under Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_aligndistil.parallel.setup import Layout
from megatron_aligndistil.types import Example, Sequence


@dataclass(frozen=True)
class Case:
    """A layout and a way of batching; everything else is the algorithm's configuration."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    sequence_parallel: bool = False
    world: int = 1
    micro_batch_size: int = 1
    packed: bool = False
    dtype: str = "64"
    recompute: str | None = None
    distributed_optimizer: bool = False

    @property
    def layout(self) -> Layout:
        """What decides the process groups."""
        return Layout(self.tensor, self.pipeline, self.virtual_pipeline, self.context, self.sequence_parallel)

    def __str__(self) -> str:
        flags = [
            name
            for name in ("sequence_parallel", "packed", "recompute", "distributed_optimizer")
            if getattr(self, name)
        ]
        data = self.world // self.layout.replica_size
        text = f"tp{self.tensor}-pp{self.pipeline}-dp{data}-mb{self.micro_batch_size}"
        text += f"-vpp{self.virtual_pipeline}" if self.virtual_pipeline else ""
        text += f"-cp{self.context}" if self.context > 1 else ""
        return "-".join([text, self.dtype, *flags])


@dataclass(frozen=True)
class Job:
    """What is computed: an algorithm's name, its section of the configuration, the model folder and the examples."""

    algorithm: str
    section: Mapping[str, Any]
    model: str
    examples: list[Example] = field(default_factory=list)


Answer = tuple[dict[str, float], dict[str, torch.Tensor]]


def losses_and_gradients(work: list[tuple[Job, Case]]) -> list[Answer | None]:
    """``loss_and_gradient`` of each, one after another in the same processes; the cases share one layout."""
    from megatron_aligndistil.parallel import setup

    setup.initialize(work[0][1].layout, seed=1)
    return [loss_and_gradient(job, case) for job, case in work]


def loss_and_gradient(job: Job, case: Case) -> Answer | None:
    """Runs on every rank, whose groups exist; (metrics, gradients by name) on rank 0, None elsewhere."""
    from megatron_aligndistil.algorithms.table import ALGORITHMS
    from megatron_aligndistil.checkpoint.hf_export import hf_tensors
    from megatron_aligndistil.checkpoint.locate import read_architecture
    from megatron_aligndistil.checkpoint.weights import load_weights
    from megatron_aligndistil.data.collate import MicroBatching, micro_batches
    from megatron_aligndistil.models.frozen import FrozenModel
    from megatron_aligndistil.models.policy import ModelSettings, Recompute, build_chunks
    from megatron_aligndistil.parallel import groups
    from megatron_aligndistil.trainer.metrics import Totals, WorldMetrics
    from megatron_aligndistil.trainer.objective import Objective
    from megatron_aligndistil.trainer.optimizer import wrap

    dtype = {"64": torch.float64, "32": torch.float32}[case.dtype]
    torch.set_default_dtype(dtype)  # Megatron-Core divides by the count in the default type
    recompute = Recompute(
        case.recompute, "uniform" if case.recompute == "full" else None, 1 if case.recompute == "full" else None
    )
    settings = ModelSettings(case.layout, dtype, 64, 8, transformer_engine=False, recompute=recompute)

    def model(path: str) -> list[Any]:
        chunks = build_chunks(read_architecture(path), settings)
        load_weights(chunks, path)
        return chunks

    algorithm = ALGORITHMS[job.algorithm](config_of(job))
    chunks = model(job.model)
    frozen = {name: FrozenModel(model(role.path), offload=False) for name, role in algorithm.roles.items()}
    objective, wrapped = Objective(algorithm, chunks, frozen), wrap(chunks, case.distributed_optimizer)
    how = MicroBatching(
        batching="packed" if case.packed else "bucketed",
        micro_batch_size=case.micro_batch_size,
        pack_length=80,
        pad_multiple=(2 * case.context if case.context > 1 else 1) * (case.tensor if case.sequence_parallel else 1),
        n_multiple=case.pipeline if case.virtual_pipeline else 1,
    )
    examples = job.examples
    if algorithm.transform is not None:
        examples = [algorithm.transform(example) for example in examples]
    batches = micro_batches(examples, groups.data().rank, groups.data().size, how)
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    losses = objective.gradients(wrapped, batches, objective.annotate(batches))
    if case.distributed_optimizer:
        _gather_sharded_gradients(wrapped)
    totals = Totals()
    totals.add(losses, batches)
    metrics = WorldMetrics(torch.device("cpu")).reduce("train", totals)
    gradients = {name: tensor.clone() for name, tensor in hf_tensors(chunks, lambda parameter: parameter.main_grad)}
    return (metrics, gradients) if groups.world().rank == 0 else None


def _gather_sharded_gradients(wrapped: list[Any]) -> None:
    """Each data-parallel rank has the sum of its own part of every bucket only."""
    from megatron_aligndistil.parallel import groups

    axis = groups.data()
    for bucket in (bucket for chunk in wrapped for buffer in chunk.buffers for bucket in buffer.buckets):
        part = bucket.grad_data.chunk(axis.size)[axis.rank].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, part, group=axis.group)


def config_of(job: Job) -> Any:
    """The run configuration of a job, as the command line would build it."""
    from megatron_aligndistil.config import schema

    kinds = {"sft": schema.SFTRunConfig, "dpo": schema.DPORunConfig, "reverse_dpo": schema.DPORunConfig}
    config: Any = kinds.get(job.algorithm, schema.AlignDistilRunConfig)()
    config.model.restore_from_path = job.model
    config.model.kernel.chunk_tokens = 7
    section = {"sft": None, "reverse_dpo": "dpo"}.get(job.algorithm, job.algorithm)
    for key, value in job.section.items():
        setattr(getattr(config.model, section), key, value)
    return config


def random_sequence(rng: np.random.Generator, vocab_size: int) -> Sequence:
    """A prompt of 1 to 6 tokens and a response of 1 to 14."""
    prompt, response = int(rng.integers(1, 7)), int(rng.integers(1, 15))
    return Sequence(rng.integers(0, vocab_size, prompt + response).astype(np.int32), prompt)


def save_random_model(folder: Path, config: Any, seed: int, scale: float) -> dict[str, torch.Tensor]:
    """A transformers model with random float64 weights, saved as safetensors; returns its weights by name."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).double()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        weights[name] = 1.0 + 0.1 * noise if "norm" in name else scale * noise
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights
