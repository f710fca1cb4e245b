"""Requests in threads, for whose end nobody has to wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

GRACE_SECONDS = 5.0  # that requests under way have to come to an end once they are told to stop
_POLL_SECONDS = 0.2


class Stopped(Exception):
    """It was told to stop before all was done."""


def in_threads(
    work: Callable[[Item], Value], items: Sequence[Item], workers: int, stop: threading.Event
) -> Generator[tuple[Item, Value]]:
    """Each item with what ``work`` makes of it, in the order they are done; to be closed by whoever reads it.

    An error, a signal or ``stop`` begins nothing more. What is under way is waited for, after ``stop`` no longer than
    ``GRACE_SECONDS``: the threads are daemons, whose process may end before them.

    Raises:
        Stopped: ``stop`` is set.
        Exception: the first that ``work`` raises.
    """
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Item, Value] | BaseException] = queue.SimpleQueue()
    halted = threading.Event()
    for item in items:
        todo.put(item)

    def run() -> None:
        while not halted.is_set():
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((item, work(item)))
            except BaseException as error:
                done.put(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for _ in items:
            found = _next(done, stop)
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        halted.set()
        deadline = time.monotonic() + GRACE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()) if stop.is_set() else None)


def _next(done: queue.SimpleQueue[Item], stop: threading.Event) -> Item:
    while not stop.is_set():
        try:
            return done.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
    raise Stopped
