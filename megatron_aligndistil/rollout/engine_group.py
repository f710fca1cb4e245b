"""Every rank's engine as one: weights streamed to all, requests dealt out, answers gathered, losses repaired."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import collectives, groups
from megatron_aligndistil.rollout.engine import Engine, EngineLost, Request, Sampling
from megatron_aligndistil.rollout.weight_stream import weight_buckets
from megatron_aligndistil.types import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stream:
    """How weights travel: the type that the engines get them in, and how much of them at a time."""

    dtype: torch.dtype
    bucket_bytes: int


class EngineGroup:
    """The engines of all ranks; every rank makes the same calls with the same arguments and gets the same answers.

    An engine that is lost on the way is started again and given the policy's weights, and what was asked is asked
    again of the engines that had not answered: nothing is lost, and nothing counted twice.

    synced_bytes, restarts  so far
    """

    def __init__(self, engine: Engine, chunks: Sequence[HiddenStateModel], stream: Stream) -> None:
        self.engine, self.chunks, self.stream = engine, list(chunks), stream
        generating = collectives.gather_objects(engine.generates)
        self._place = sum(generating[: groups.world().rank])
        self._size = sum(generating)
        self.synced_bytes = self.restarts = 0

    def sync(self) -> None:
        """Give every engine the policy's weights."""
        while True:
            start = time.perf_counter()
            lost = self._push()
            if not any(collectives.gather_objects(lost)):
                seconds = time.perf_counter() - start
                logger.info("weights to the engines: %.2f s", seconds)
                return
            self._restart(lost)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """One response a request, in order."""
        return self._dealt(requests, lambda share: self.engine.generate(share, sampling))

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of the tokens 1, 2, … of each sequence."""
        return self._dealt(sequences, self.engine.score)

    def wake(self) -> None:
        """Before weights and requests."""
        self._whole(self.engine.wake)

    def sleep(self) -> None:
        """After them, so that training has the memory."""
        self._whole(self.engine.sleep)

    def close(self) -> None:
        """End this rank's engine."""
        self.engine.close()

    def _dealt(self, items: Sequence[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Every engine's answers to its share of ``items``, by the items' order."""
        share = list(range(self._place, len(items), self._size)) if self.engine.generates else []
        answers: list[Any] | None = None
        while True:
            lost = False
            if answers is None:
                try:
                    answers = ask([items[i] for i in share])
                except EngineLost as error:
                    logger.warning("an engine was lost: %s", error)
                    lost = True
            if not any(collectives.gather_objects(lost)):
                break
            self._restart(lost)
            self.sync()
        assert answers is not None
        merged = dict(
            pair for part in collectives.gather_objects(list(zip(share, answers, strict=True))) for pair in part
        )
        return [merged[i] for i in range(len(items))]

    def _whole(self, act: Callable[[], None]) -> None:
        lost = _lost_by(act)
        if any(collectives.gather_objects(lost)):
            self._restart(lost)
            self.sync()

    def _restart(self, lost: bool) -> None:
        self.restarts += 1
        if lost:
            self.engine.restart()

    def _push(self) -> bool:
        """Stream the weights to this rank's engine; whether it was lost, in which case the others still get theirs."""
        lost = _lost_by(self.engine.begin_update)
        for bucket in weight_buckets(self.chunks, self.stream.dtype, self.stream.bucket_bytes):
            self.synced_bytes += sum(tensor.nbytes for tensor in bucket.values())
            lost = lost or _lost_by(self.engine.load, bucket)
        return lost or _lost_by(self.engine.end_update)


def _lost_by(call: Callable[..., None], *arguments: Any) -> bool:
    """Whether the engine was lost by this call."""
    try:
        call(*arguments)
    except EngineLost as error:
        logger.warning("an engine was lost: %s", error)
        return True
    return False
