"""LoRA: low-rank updates W + (alpha / R) B A of a sharded model's frozen projections.

Several named adapters can lie over one base, of which one is active at a time: a policy and its teachers then are one
model in memory. No communication is of more than R values a token and projection.

Shapes: P Hugging Face matrices that a projection fuses, R rank, I input features and O output rows of this tensor rank,
S positions and B rows of a micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_aligndistil.models.families.lora import DOWN, PAIR, PROJECTIONS, lora_table
from megatron_aligndistil.models.families.rules import MemoryPart, Slot
from megatron_aligndistil.models.families.table import SCALAR_HEAD, Entry
from megatron_aligndistil.models.placement import Placed
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import groups

TRAINED = "trained"  # the name of the adapter under training
SHARDED_ALONG = {"qkv": 0, "pair": 1, "row": 1}  # which dimension tensor ranks share, by a rule's name


@dataclass(frozen=True)
class LoRASettings:
    """``targets`` are keys of ``families.lora.PROJECTIONS``; the update is scaled by ``alpha`` / ``rank``."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(PROJECTIONS)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapter(nn.Module):
    """The update of one projection, ``lines`` being its two of the name table.

    lora_a  [P, R, I], or [R, I] of a row-parallel projection
    lora_b  [O, R] in the order of the weight's rows, or [2, O / 2, R] of gate and up projection
    """

    def __init__(self, lines: tuple[Entry, ...], linear: Any, settings: LoRASettings) -> None:
        super().__init__()
        weight, config = linear.weight, linear.config
        self.lines, self.scale, self.sequence_parallel = lines, settings.scale, config.sequence_parallel
        self.groups_here, self.head_dim = config.num_query_groups // groups.tensor().size, config.kv_channels
        self.row_parallel, self.paired = lines[0].rule.sharded, lines[1].rule is PAIR
        out, features = weight.shape
        parts, rank = len(lines[0].parts), settings.rank
        down = (rank, features) if self.row_parallel else (parts, rank, features)
        up = (2, out // 2, rank) if self.paired else (out, rank)
        self.lora_a, self.lora_b = self._parameter(lines[0], weight, down), self._parameter(lines[1], weight, up)

    def _parameter(self, line: Entry, weight: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        if line.rule.sharded:
            set_tensor_model_parallel_attributes(parameter, True, SHARDED_ALONG[line.rule.name], 1)
        elif self.sequence_parallel:
            # Each tensor rank sees some of the positions: Megatron-Core sums the gradients of what is so marked.
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
        return parameter

    def forward(self, x_SBI: Tensor) -> Tensor:
        """What is added to the projection of ``x_SBI``: [S, B, O], as the projection returns its own part."""
        down_SBR = F.linear(x_SBI, self.lora_a if self.row_parallel else self.lora_a.flatten(0, 1))
        if self.row_parallel:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            return self.scale * F.linear(reduce(down_SBR), self.lora_b)
        if self.sequence_parallel:
            down_SBR = gather_from_sequence_parallel_region(down_SBR, tensor_parallel_output_grad=True)
        else:
            down_SBR = copy_to_tensor_model_parallel_region(down_SBR)
        downs = down_SBR.chunk(len(self.lines[0].parts), dim=-1)
        ups = [F.linear(down, up.flatten(0, -2)) for down, up in zip(downs, self._ups(), strict=True)]
        return self.scale * self._interleaved(ups, dim=-1)

    def _ups(self) -> Sequence[Tensor]:
        """B of each part: [groups, rows of a group, R] of queries, keys and values, [O / 2, R] of gate and up."""
        if self.paired:
            return self.lora_b.unbind()
        grouped = self.lora_b.unflatten(0, (self.groups_here, -1))
        return grouped.split([grouped.shape[1] - 2 * self.head_dim, self.head_dim, self.head_dim], dim=1)

    def _interleaved(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The parts' output rows, which are dimension ``dim``, in the order of the projection's."""
        if self.paired:
            return torch.cat(list(parts), dim=dim)
        # One group's queries, key and value after another's; the dimension behind the groups is counted from the end.
        grouped = [part.unflatten(dim, (self.groups_here, -1)) for part in parts]
        return torch.cat(grouped, dim=dim).flatten(dim - 1, dim)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """(alpha / R) B A in the shape and order of the projection's weight on this rank, in float32 or wider."""
        wide = torch.promote_types(self.lora_a.dtype, torch.float32)
        down = self.lora_a.to(wide)
        if self.row_parallel:
            return self.scale * (self.lora_b.to(wide) @ down)
        updates = [up.to(wide).flatten(0, -2) @ a for a, up in zip(down, self._ups(), strict=True)]
        return self.scale * self._interleaved([update.T for update in updates], dim=-1).T


class Adapters:
    """What lies over a chunk: settings by name, and the active adapter's name; None: the base alone."""

    def __init__(self) -> None:
        self.settings: dict[str, LoRASettings] = {}
        self.active: str | None = None
        self.hooks: list[RemovableHandle] = []

    def add_update(self, linear: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Any]) -> Any:
        """A forward hook of a projection, which returns its output and a bias that it leaves to others."""
        if self.active is None or self.active not in linear.adapters:
            return output
        return output[0] + linear.adapters[self.active](arguments[0]), output[1]


def attach(chunks: Sequence[HiddenStateModel], name: str, settings: LoRASettings) -> None:
    """Lay an adapter over the chunks, which have their weights, and freeze all but it and a scalar head.

    It is zero until it is drawn or loaded. The first one is active from now on; ``TRAINED`` has gradients.
    """
    for chunk in chunks:
        if chunk.adapters is None:
            chunk.adapters = Adapters()
            _freeze(chunk)
        chunk.adapters.settings[name] = settings
        chunk.adapters.active = chunk.adapters.active or name
        for target, linear in _projections(chunk, settings.targets):
            if not hasattr(linear, "adapters"):
                linear.adapters = nn.ModuleDict()
                chunk.adapters.hooks.append(linear.register_forward_hook(chunk.adapters.add_update))
            adapter = Adapter(lora_table((target,), settings.rank), linear, settings)
            linear.adapters[name] = adapter.requires_grad_(name == TRAINED)


def _freeze(chunk: HiddenStateModel) -> None:
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(name.startswith(SCALAR_HEAD.parameter))
    if chunk.pre_process and chunk.config.recompute_granularity == "full":
        # What is recomputed has gradients only where one of its inputs has.
        chunk.adapters.hooks.append(
            chunk.embedding.register_forward_hook(lambda module, arguments, output: output.requires_grad_())
        )


def _projections(chunk: HiddenStateModel, targets: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for layer in chunk.decoder.layers:
        for target in targets:
            yield target, layer.get_submodule(PROJECTIONS[target])


@contextmanager
def active(chunks: Sequence[HiddenStateModel], name: str | None) -> Iterator[None]:
    """The chunks under another adapter, or none, for a while. Chunks without adapters stay as they are."""
    adapted = [chunk.adapters for chunk in chunks if chunk.adapters is not None]
    before = [adapters.active for adapters in adapted]
    for adapters in adapted:
        adapters.active = name
    try:
        yield
    finally:
        for adapters, previous in zip(adapted, before, strict=True):
            adapters.active = previous


@dataclass(frozen=True)
class PlacedAdapter(Placed):
    """An adapter's parameter of this rank with its line of the table; ``dimension`` is what ranks share, if any."""

    dimension: int | None


def placed_adapter(chunks: Sequence[HiddenStateModel], name: str) -> Iterator[PlacedAdapter]:
    """Every parameter of an adapter on this rank."""
    axis = groups.tensor()
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for module in PROJECTIONS.values():
                linear = layer.get_submodule(module)
                if name not in getattr(linear, "adapters", ()):
                    continue
                adapter = linear.adapters[name]
                for line, parameter in zip(adapter.lines, (adapter.lora_a, adapter.lora_b), strict=True):
                    slot = Slot(tuple(parameter.shape), axis.rank, axis.size, chunk.architecture.num_query_groups)
                    dimension = SHARDED_ALONG.get(line.rule.name)
                    yield PlacedAdapter(line, layer.layer_number - 1, parameter, slot, dimension)


@torch.no_grad()
def draw(chunks: Sequence[HiddenStateModel], name: str, seed: int) -> None:
    """PEFT's start: A uniform in ±1/√in, B zero, so that the model is the base. The same under every layout."""
    for placed in placed_adapter(chunks, name):
        if not placed.entry.parameter.endswith(DOWN):
            placed.parameter.zero_()
            continue
        shapes = placed.entry.hf_shapes(chunks[0].architecture, placed.layer)
        parts = [MemoryPart(_uniform(shape, seed, tensor)) for tensor, shape in shapes.items()]
        placed.parameter.copy_(placed.entry.rule.split(parts, placed.slot))


def _uniform(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5


@torch.no_grad()
def merge(chunks: Sequence[HiddenStateModel]) -> None:
    """Add the active adapter to the weights it updates, and take every adapter off: an ordinary model again."""
    for chunk in chunks:
        if chunk.adapters is None:
            continue
        for parameter, adapter in updates(chunk).items():
            parameter.copy_(merged(parameter, adapter))
        for hook in chunk.adapters.hooks:
            hook.remove()
        for _, linear in _projections(chunk, PROJECTIONS):
            if hasattr(linear, "adapters"):
                del linear.adapters
        chunk.adapters = None
        chunk.requires_grad_()


@torch.no_grad()
def merged(weight: Tensor, adapter: Adapter) -> Tensor:
    """The weight with its update, rounded once to the weight's type."""
    return (weight + adapter.delta()).to(weight.dtype)


def updates(chunk: HiddenStateModel) -> dict[nn.Parameter, Adapter]:
    """Weight → what the active adapter adds to it."""
    if chunk.adapters is None or chunk.adapters.active is None:
        return {}
    settings = chunk.adapters.settings[chunk.adapters.active]
    return {
        linear.weight: linear.adapters[chunk.adapters.active] for _, linear in _projections(chunk, settings.targets)
    }
