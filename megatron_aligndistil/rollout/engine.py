"""What draws responses from the policy: the protocol that every engine keeps, and what goes in.

Nothing here imports torch's distributed parts or an engine's library: an engine acts on one rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from megatron_aligndistil.types import Sample

SEED_BITS = 63


class EngineLost(RuntimeError):
    """The engine died or stopped answering; after ``restart`` and new weights it can be asked again."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 take the whole vocabulary."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One response wanted: the prompt's token ids, int32 [P], and the seed that it is drawn with."""

    prompt: np.ndarray
    seed: int


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on all ``parts`` and on nothing else."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


class Engine(Protocol):
    """An engine as one rank sees it. Ranks whose engine does not ``generate`` are only told of weights.

    Calls come in this order: ``wake``, weights (``begin_update``, ``load`` a bucket at a time, ``end_update``), any
    number of ``generate`` and ``score``, ``sleep``. ``EngineLost`` may be raised by all but ``restart`` and ``close``.
    """

    @property
    def generates(self) -> bool:
        """Whether this rank's engine draws responses: requests are dealt to the ranks whose engine does."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """One response a request, in order. The same weights, requests and sampling give the same tokens."""
        ...

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs, nats, of the tokens 1, 2, … of each sequence int32 [S]: float32 [S - 1]."""
        ...

    def begin_update(self) -> None:
        """New weights follow."""
        ...

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """Some of them, whole tensors under Hugging Face names; each is given once, on every rank."""
        ...

    def end_update(self) -> None:
        """All weights were given."""
        ...

    def sleep(self) -> None:
        """Leave the device's memory to training, where the engine shares it."""
        ...

    def wake(self) -> None:
        """Take it back."""
        ...

    def restart(self) -> None:
        """Start again after ``EngineLost``; all weights must follow.

        Raises:
            RolloutError: it doesn't start, or has been lost too often.
        """
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...
