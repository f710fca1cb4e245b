"""Which lines of a family's name table this rank's parameters are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_aligndistil.models import families
from megatron_aligndistil.models.families.rules import Slot
from megatron_aligndistil.models.families.table import LAYER, Entry, entry_of
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import groups

_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Placed:
    """A parameter of this rank with its line of the table; ``layer`` counts from 0 over the whole model."""

    entry: Entry
    layer: int | None
    parameter: Tensor
    slot: Slot

    @property
    def key(self) -> tuple[str, int | None]:
        return self.entry.parameter, self.layer


def placed_parameters(chunks: Sequence[HiddenStateModel]) -> Iterator[Placed]:
    """Every parameter of this rank's chunks (not wrapped in DDP) but those of adapters (``lora.placed_adapter``)."""
    axis = groups.tensor()
    for chunk in chunks:
        architecture = chunk.architecture
        table = families.table_of(architecture)
        for name, parameter in chunk.named_parameters():
            if ".adapters." in name:
                continue
            match, layer, generic = _IN_LAYER.fullmatch(name), None, name
            if match:
                layer = chunk.decoder.layers[int(match[1])].layer_number - 1
                generic = f"decoder.layers.{LAYER}.{match[2]}"
            slot = Slot(tuple(parameter.shape), axis.rank, axis.size, architecture.num_query_groups)
            yield Placed(entry_of(table, architecture, generic), layer, parameter, slot)
