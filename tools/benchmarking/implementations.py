"""The table of what is compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarking import authors, own, peers
from benchmarking.authors import Loss
from benchmarking.problem import Problem

YARDSTICK = "five_products"


@dataclass(frozen=True)
class Implementation:
    """One row's subject.

    loss      untimed preparation for a problem, whose policy is a pair of leaves; what it returns is timed, with its
              backward pass. None for the yardstick.
    products  head products that its loss and gradients take at the least: 5 with two teachers, 4 with one
    sharded   whether it runs on a vocabulary shard
    compiled  whether its first call compiles, which neither its time nor its memory includes
    """

    loss: Callable[[Problem], Loss] | None
    products: int
    sharded: bool
    compiled: bool = False


TWO_TEACHERS = Implementation(own.ours, products=5, sharded=True)
ONE_TEACHER = Implementation(own.ours_reverse_kl, products=4, sharded=True)

IMPLEMENTATIONS: dict[str, Implementation] = {
    YARDSTICK: replace(TWO_TEACHERS, loss=None),
    "ours": TWO_TEACHERS,
    "ours_store": replace(TWO_TEACHERS, loss=functools.partial(own.ours, plan="store")),
    "ours_recompute": replace(TWO_TEACHERS, loss=functools.partial(own.ours, plan="recompute")),
    "ours_with_scalars": replace(TWO_TEACHERS, loss=own.ours_with_scalars),
    "authors": Implementation(authors.authors, products=5, sharded=False),
    "authors_compiled": Implementation(authors.authors_compiled, products=5, sharded=False, compiled=True),
    "local_shard_eager": replace(TWO_TEACHERS, loss=authors.local_shard_eager),
    "ours_reverse_kl": ONE_TEACHER,
    "authors_reverse_kl": Implementation(authors.authors_reverse_kl, products=4, sharded=False),
    "liger": Implementation(peers.liger, products=4, sharded=False, compiled=True),
    "modelopt": replace(ONE_TEACHER, loss=peers.modelopt),
}
