"""One optimizer step's loss and gradient on real Megatron-Core, in any layout, under Hugging Face names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.algorithms.table import ALGORITHMS
from megatron_aligndistil.certificate.adapters import BASE, SCORE, SETTINGS, AdaptedWorld
from megatron_aligndistil.certificate.algorithm_check import AlgorithmCheck, Reference
from megatron_aligndistil.certificate.dense_model import Weights
from megatron_aligndistil.certificate.findings import Measurement, worst
from megatron_aligndistil.certificate.models import InMemory, World, architecture_for
from megatron_aligndistil.certificate.recorder import Recorder
from megatron_aligndistil.certificate.rollouts import constants_of, with_experience
from megatron_aligndistil.checkpoint.hf_import import load_hf
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.gathering import gathered_adapter, hf_tensors
from megatron_aligndistil.models.lora import TRAINED, attach, placed_adapter
from megatron_aligndistil.models.policy import HiddenStateModel, ModelSettings, Recompute, build_chunks
from megatron_aligndistil.parallel import groups
from megatron_aligndistil.parallel.setup import Layout
from megatron_aligndistil.trainer.metrics import Totals, WorldMetrics
from megatron_aligndistil.trainer.objective import Objective
from megatron_aligndistil.trainer.optimizer import wrap
from megatron_aligndistil.types import Batch

# What divides the padded vocabulary: with 128 a tied head of 83 entries has shards that are all padding at TP = 4.
VOCAB_DIVISIBLE_BY = {True: 8, False: 128}


@dataclass(frozen=True)
class Case:
    """A layout, a way of batching, a number type and a kind of head."""

    layout: Layout = field(default_factory=Layout)
    world: int = 1
    micro_batch_size: int = 1
    packed: bool = False
    dtype: torch.dtype = torch.float64
    tied: bool = True
    recompute: str | None = None
    distributed_optimizer: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("packed", "recompute", "distributed_optimizer") if getattr(self, name)]
        return "-".join([layout_name(self.layout, self.world), f"mb{self.micro_batch_size}", *flags])


def layout_name(layout: Layout, world: int) -> str:
    """``tp2-pp1-dp2-sp``."""
    text = f"tp{layout.tensor}-pp{layout.pipeline}-dp{world // layout.replica_size}"
    text += f"-vpp{layout.virtual_pipeline}" if layout.virtual_pipeline else ""
    text += f"-cp{layout.context}" if layout.context > 1 else ""
    return text + ("-sp" if layout.sequence_parallel else "")


@dataclass
class Answer:
    """A step's results on one rank.

    gradients   whole on rank 0, empty elsewhere
    words       elements sent by the algorithm's own functions
    tokens      response tokens that the rank's head saw, in ``batches`` micro-batches; both 0 without a head
    peak_bytes  held beside models and gradients
    """

    metrics: dict[str, float]
    gradients: Weights
    words: int
    tokens: int
    batches: int
    peak_bytes: int

    def against(self, reference: Reference | None) -> Measurement:
        """Compared with the dense loss and gradients, on rank 0; every weight counts alike."""
        words = self.words / self.tokens if self.tokens else None
        if reference is None:
            return Measurement(0.0, 0.0, words, self.peak_bytes)
        loss, gradients = reference
        if set(self.gradients) != set(gradients):
            raise AssertionError(f"gradients of other weights: {set(self.gradients) ^ set(gradients)}")
        off = {name: float((self.gradients[name].cpu().double() - gradients[name]).norm()) for name in gradients}
        norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        errors = [math.hypot(*off.values()) / math.hypot(*norms.values()), *(off[n] / norms[n] for n in norms)]
        value_error = abs(self.metrics["loss"] - loss.value) / loss.size
        return Measurement(value_error, worst(errors), words, self.peak_bytes)

    def words_due(self, check: AlgorithmCheck) -> float:
        """Elements a response token that the rank had to send."""
        if groups.tensor().size == 1 or not self.tokens:
            return 0.0
        return (check.words * self.tokens + check.words_a_batch * self.batches) / self.tokens


@dataclass(frozen=True)
class Trained:
    """A model's chunks, and the same in Megatron-Core's DDP."""

    chunks: list[HiddenStateModel]
    wrapped: list[DistributedDataParallel]


class ShardedWorld:
    """The world's models on this rank in one case's layout, built as they are first asked for."""

    def __init__(self, world: World, case: Case) -> None:
        self.world, self.case = world, case
        self._trained: dict[str, Trained] = {}
        self._frozen: dict[str, FrozenModel] = {}

    @classmethod
    def of(cls, case: Case) -> ShardedWorld:
        """Of random models that suit the case."""
        return cls(World(architecture_for(case.layout, case.tied)), case)

    @functools.cached_property
    def _adapted(self) -> ShardedWorld:
        """The same with adapters for models."""
        return ShardedWorld(AdaptedWorld(self.world.architecture, self.world.examples), self.case)

    def _model(self, role: str, base: bool = False) -> list[HiddenStateModel]:
        case = self.case
        full = case.recompute == "full"
        settings = ModelSettings(
            case.layout,
            case.dtype,
            max_sequence_length=64,
            vocab_divisible_by=VOCAB_DIVISIBLE_BY[case.tied],
            transformer_engine=False,
            recompute=Recompute(case.recompute, "uniform" if full else None, 1 if full else None),
        )
        chunks = build_chunks(self.world.architecture_of(role), settings)
        weights = self.world.base(role) if base and isinstance(self.world, AdaptedWorld) else self.world.weights(role)
        load_hf(chunks, InMemory(weights))
        return chunks

    def _trained_model(self, role: str) -> Trained:
        if role not in self._trained:
            chunks = self._model(role, base=True)
            self._adapt(chunks, TRAINED, role)
            self._trained[role] = Trained(chunks, wrap(chunks, self.case.distributed_optimizer))
        return self._trained[role]

    def _adapt(self, chunks: list[HiddenStateModel], name: str, role: str) -> None:
        """Lay the adapter of a role over chunks that have its base, where the world has adapters."""
        if not isinstance(self.world, AdaptedWorld) or role == BASE:
            return
        attach(chunks, name, SETTINGS)
        source = InMemory(self.world.adapter(role))
        for placed in placed_adapter(chunks, name):
            names = placed.entry.hf_shapes(self.world.architecture, placed.layer)
            placed.parameter.data.copy_(placed.entry.rule.split([source.part(part) for part in names], placed.slot))

    def _role_model(self, role: str, trained: str) -> FrozenModel:
        """The model of a role of a step: an adapter over the policy's base, where the policy has one too."""
        if not isinstance(self.world, AdaptedWorld) or trained != "policy":
            return self._frozen_model(role)
        chunks, name = self._trained_model(trained).chunks, None if role == BASE else role
        if name is not None and name not in chunks[0].adapters.settings:
            self._adapt(chunks, role, role)
        return FrozenModel(chunks, offload=False, adapter=name, borrowed=True)

    def _frozen_model(self, role: str) -> FrozenModel:
        if role not in self._frozen:
            self._frozen[role] = FrozenModel(self._model(role), offload=False)
        return self._frozen[role]

    def step(self, check: AlgorithmCheck, kernel: KernelConfig) -> Answer:
        """Loss and gradient of one step of all examples. Every rank calls it."""
        if check.lora and not isinstance(self.world, AdaptedWorld):
            return self._adapted.step(check, kernel)
        with _default_dtype(self.case.dtype):  # Megatron-Core divides by the count in the default type
            if torch.cuda.is_available():
                self._step(check, kernel)  # tuning and libraries' own memory come with the first call
            return self._step(check, kernel)

    def _step(self, check: AlgorithmCheck, kernel: KernelConfig) -> Answer:
        algorithm = ALGORITHMS[check.algorithm](check.config(kernel))
        batches = self._batches(check, algorithm)
        counter = WordCounter()
        minimised = counter.counting(check.step_of(algorithm))
        trained = self._trained_model(check.trained)
        frozen = {name: self._role_model(role.path, check.trained) for name, role in minimised.roles.items()}
        objective = Objective(minimised, trained.chunks, frozen)
        for chunk in trained.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()

        totals = Totals()
        with counter.recorder:
            losses = objective.gradients(trained.wrapped, batches, objective.annotate(batches))
        totals.add(losses, batches)
        if self.case.distributed_optimizer:
            _gather_sharded_gradients(trained)
        metrics = WorldMetrics(_device()).reduce("train", totals)
        gradients = _gradients(trained.chunks)
        seen = batches if groups.is_last_stage() else []
        tokens = sum(int(batch.loss_mask.sum()) for batch in seen)
        return Answer(metrics, gradients, counter.words, tokens, len(seen), counter.recorder.peak_bytes)

    def _batches(self, check: AlgorithmCheck, algorithm: Algorithm) -> list[Batch]:
        examples = check.examples(self.world)
        if algorithm.transform is not None:
            examples = [algorithm.transform(example) for example in examples]
        if algorithm.experience is not None:
            examples = with_experience(examples, algorithm.experience, self._frozen_model, self._batching())
        trained = self._trained_model(check.trained).chunks
        constants = constants_of(examples, algorithm.estimate, trained, self._frozen_model, self._batching())
        batches = micro_batches(examples, groups.data().rank, groups.data().size, self._batching())
        return [replace(batch, constants=constants).to(_device()) for batch in batches]

    def _batching(self) -> MicroBatching:
        case, layout = self.case, self.case.layout
        return MicroBatching(
            batching="packed" if case.packed else "bucketed",
            micro_batch_size=case.micro_batch_size,
            pack_length=80,
            pad_multiple=(2 * layout.context if layout.context > 1 else 1)
            * (layout.tensor if layout.sequence_parallel else 1),
            n_multiple=layout.pipeline if layout.virtual_pipeline else 1,
        )


def _gather_sharded_gradients(trained: Trained) -> None:
    """Each data-parallel rank has the sum of its own part of every bucket only."""
    axis = groups.data()
    for bucket in (bucket for chunk in trained.wrapped for buffer in chunk.buffers for bucket in buffer.buckets):
        part = bucket.grad_data.chunk(axis.size)[axis.rank].clone()
        dist.all_gather_into_tensor(bucket.grad_data, part, group=axis.group)


@dataclass
class WordCounter:
    """Elements that an algorithm's own functions sent, as ``recorder`` saw them."""

    recorder: Recorder = field(default_factory=Recorder)
    words: int = 0

    def counting(self, algorithm: Algorithm) -> Algorithm:
        """The algorithm with its loss, its annotation and what its roles keep counted."""
        roles = {name: replace(role, keep=self._counted(role.keep)) for name, role in algorithm.roles.items()}
        return replace(
            algorithm, loss=self._counted(algorithm.loss), annotate=self._counted(algorithm.annotate), roles=roles
        )

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*arguments: Any) -> Any:
            before = self.recorder.words
            result = function(*arguments)
            self.words += self.recorder.words - before
            return result

        return counted


def _gradients(chunks: list[HiddenStateModel]) -> Weights:
    """The gradient of everything that is trained, by Hugging Face name; on rank 0."""
    adapted = chunks[0].adapters is not None
    tensors = hf_tensors(chunks, _main_grad)
    found = {name: tensor.clone() for name, tensor in tensors if not adapted or name == SCORE}
    if adapted:
        own = gathered_adapter(chunks, TRAINED, _main_grad)
        found |= {name: tensor.clone() for name, tensor in own if tensor is not None}
    return found


def _main_grad(parameter: Any) -> Tensor:
    """Where Megatron-Core's DDP sums a parameter's gradient; what is frozen has none."""
    return parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())
