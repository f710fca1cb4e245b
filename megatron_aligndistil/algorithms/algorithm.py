"""What an algorithm is: a value that the training loop reads. The loop knows none of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, Example, LossOutput, VocabHead


@dataclass(frozen=True)
class Role:
    """A frozen model that an algorithm needs.

    ``keep`` is what survives its forward pass of a micro-batch: hidden states [T, H] or log-probs [T].
    """

    path: str
    config_key: str
    keep: Callable[[Projection, Batch], Tensor]


@dataclass(frozen=True)
class RoleOutput:
    """What a role kept of one micro-batch, and its head."""

    kept: Tensor
    head: VocabHead


Annotate = Callable[[Batch, Mapping[str, RoleOutput]], Any]


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    kind       whether an example is a pair of responses or a single one
    transform  applied to every example as it is read
    roles      name → frozen model
    annotate   turns the roles' outputs of a micro-batch into what the loss takes, once, before the policy's pass
    loss       from the policy's projection, the micro-batch and its annotation
    """

    name: str
    kind: Literal["preference", "demonstration"]
    loss: Callable[[Projection, Batch, Any], LossOutput]
    roles: Mapping[str, Role] = field(default_factory=dict)
    annotate: Annotate = lambda batch, outputs: None
    transform: Callable[[Example], Example] | None = None
