"""Work of the first rank that may take longer than ranks otherwise wait for one another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from megatron_aligndistil.parallel import collectives, groups, heartbeat

Value = TypeVar("Value")

_POLL_SECONDS = 1.0


def made_by_first_rank(
    work: Callable[[threading.Event], Value | None], phase: str, interrupted: Callable[[], bool]
) -> Value | None:
    """What rank 0 makes of ``work`` in a thread, on every rank; None where all ranks are ``interrupted``.

    The ranks meet and beat in the meantime, so that no watchdog takes them for hanging. ``work`` is told to come to an
    end by its event.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix=phase) as pool:
        future = pool.submit(work, stop) if groups.world().rank == 0 else None
        try:
            while True:
                heartbeat.beat(phase)
                if collectives.from_first_rank(future is not None and bool(wait([future], _POLL_SECONDS).done)):
                    return collectives.from_first_rank(None if future is None else future.result())
                if interrupted():
                    return None
        finally:
            stop.set()  # the pool waits for its thread, whatever has ended this
