"""Frozen roles: models that are only run forward, each through the whole pipeline, and what is kept of them.

Between their passes the bodies can wait in host memory; the heads stay on the device, since the policy's step needs
them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_aligndistil.models.heads import head_of, project
from megatron_aligndistil.models.lora import active
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import groups, schedule
from megatron_aligndistil.types import Batch, VocabHead

logger = logging.getLogger(__name__)


class FrozenModel:
    """A model without gradients. ``head`` is None on all but the last pipeline stage, and of a scalar model.

    adapter   the one of the chunks' adapters that makes it this model; None: their base
    borrowed  the chunks are the base under a policy that trains an adapter: they keep their gradients, and stay where
              they are
    """

    def __init__(
        self, chunks: Sequence[HiddenStateModel], offload: bool, adapter: str | None = None, borrowed: bool = False
    ) -> None:
        self.chunks, self.adapter = list(chunks), adapter
        for chunk in self.chunks:
            if not borrowed:
                chunk.eval().requires_grad_(False)
        self.device = next(self.chunks[0].parameters()).device
        has_head = groups.is_last_stage() and not self.chunks[-1].architecture.scalar_head
        self.head: VocabHead | None = head_of(self.chunks[-1]) if has_head else None
        self.offload = offload and not borrowed and self.device.type == "cuda"
        if offload and self.device.type != "cuda":
            logger.info("model.frozen.offload: the device is the host already; nothing is moved")
        self._move(torch.device("cpu"))

    def run(self, batches: Sequence[Batch], keep: Callable[[Any, Batch], Tensor]) -> list[Tensor]:
        """``keep(projection, micro-batch)`` of every micro-batch, on the last stage; empty elsewhere.

        The projection is what ``heads.project`` makes of the model's last hidden states.
        """

        def on_last_stage(hidden_SBH: Tensor, index: int) -> Tensor:
            return keep(project(self.chunks[-1], hidden_SBH, batches[index]), batches[index])

        self._move(self.device)
        for chunk in self.chunks:
            chunk.eval()
        with active(self.chunks, self.adapter):
            kept = schedule.forward_only(self.chunks, batches, on_last_stage)
        self._move(torch.device("cpu"))
        return kept

    def _move(self, device: torch.device) -> None:
        if not self.offload:
            return
        resident = self.head.weight if self.head is not None else None
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                if parameter is not resident:
                    parameter.data = parameter.data.to(device, non_blocking=True)
        torch.cuda.synchronize()
