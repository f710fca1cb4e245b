"""Which examples share a row or a micro-batch. Everything here is deterministic and works on lengths alone."""

from __future__ import annotations

import numpy as np

Bins = list[list[int]]


def deal(lengths: list[int], hands: int) -> Bins:
    """Deal items to ``hands`` in order of length, forth and back, longest first: counts differ by one at most.

    Returns the indices of each hand, longest first, so that the k-th items of all hands are about equally long.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    out: Bins = [[] for _ in range(hands)]
    for position, index in enumerate(order):
        turn, offset = divmod(position, hands)
        out[hands - 1 - offset if turn % 2 else offset].append(int(index))
    return out


def first_fit_decreasing(lengths: list[int], capacity: int) -> Bins:
    """Indices in bins whose lengths sum to at most ``capacity``; no length may exceed it."""
    bins: Bins = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > capacity:
            raise ValueError(f"item {index} of length {lengths[index]} exceeds the capacity {capacity}")
        at = next((at for at, free in enumerate(room) if lengths[index] <= free), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(capacity)
        bins[at].append(index)
        room[at] -= lengths[index]
    return bins


def split_to_multiple(bins: Bins, lengths: list[int], multiple: int) -> Bins:
    """Split the fullest bins in two until their number is a multiple, or until each holds a single item."""
    bins = list(bins)
    while len(bins) % multiple:
        divisible = [at for at, members in enumerate(bins) if len(members) > 1]
        if not divisible:
            break
        fullest = max(divisible, key=lambda at: sum(lengths[i] for i in bins[at]))
        members = bins.pop(fullest)
        first, second = deal([lengths[i] for i in members], 2)
        bins[fullest:fullest] = [[members[i] for i in first], [members[i] for i in second]]
    return bins
