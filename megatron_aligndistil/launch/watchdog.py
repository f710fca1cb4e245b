"""A thread in every rank that ends a run whose ranks wait for something that does not come.

Where a phase of one rank lasts too long, all of them write down where they are, the first to notice says which of them
is behind, and all exit. The ranks speak through the store that they met at; the main threads are not needed for it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_aligndistil.launch import failures
from megatron_aligndistil.parallel import heartbeat

STACKS = "hang"  # in the log folder
_POLL_SECONDS = 2.0
_ANSWER_SECONDS = 10.0  # how long the others are waited for
_SHOWN = 16
_ALARM, _ANSWER, _TOLD = "aligndistil/hang", "aligndistil/hang/{}", "aligndistil/hang/told"


@dataclass(frozen=True)
class Whereabouts:
    """What a rank was doing: its last beat, the innermost frames of its main thread, ours and anyone's, and whether
    that is in a collective.
    """

    phase: str
    number: int
    seconds: float
    frame: str
    waits: bool

    @classmethod
    def here(cls) -> Whereabouts:
        """This rank's, as seen from another thread."""
        beat = heartbeat.current()
        return cls(beat.phase, beat.number, beat.seconds, *_innermost(threading.main_thread()))


class Watchdog:
    """Watches this rank from entering to leaving; ``limit_seconds`` is what a phase may take."""

    def __init__(self, limit_seconds: float, log_dir: Path) -> None:
        self.limit_seconds, self.folder = limit_seconds, log_dir / STACKS
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._store: dist.TCPStore | None = None

    def __enter__(self) -> Watchdog:
        heartbeat.beat("starting")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        # Python ends daemon threads at exit, and one that is inside the store's C++ then aborts the process.
        self._thread.join(_POLL_SECONDS)

    def _watch(self) -> None:
        while not self._over.wait(min(_POLL_SECONDS, self.limit_seconds / 4)):
            hangs = heartbeat.current().seconds > self.limit_seconds
            if self.world_size == 1 or not dist.is_initialized():
                if hangs:
                    self._end_alone()
                continue
            try:
                if hangs or self._the_store().check([_ALARM]):
                    self._end(self._the_store())
            except (RuntimeError, dist.DistError):  # whoever kept it has gone, and with it the run
                if hangs:
                    self._end_alone()

    def _the_store(self) -> dist.TCPStore:
        if self._store is None:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(address, port, timeout=timedelta(seconds=_ANSWER_SECONDS))
        return self._store

    def _end(self, store: dist.TCPStore) -> None:
        first = store.add(_ALARM, 1) == 1
        self._dump()
        store.set(_ANSWER.format(self.rank), json.dumps(vars(Whereabouts.here())))
        deadline = time.monotonic() + _ANSWER_SECONDS
        if first:
            keys = [_ANSWER.format(rank) for rank in range(self.world_size)]
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.1)
            found = {rank: Whereabouts(**json.loads(store.get(k))) for rank, k in enumerate(keys) if store.check([k])}
            self._tell(found)
            store.set(_TOLD, "")
        while not store.check([_TOLD]) and time.monotonic() < deadline + _ANSWER_SECONDS:
            time.sleep(0.1)
        os._exit(failures.HUNG)

    def _end_alone(self) -> None:
        self._dump()
        self._tell({self.rank: Whereabouts.here()})
        os._exit(failures.HUNG)

    def _tell(self, found: Mapping[int, Whereabouts]) -> None:
        text = describe(found, self.world_size, self.limit_seconds, self.folder)
        failures.leave("hang", text)

    def _dump(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank_{self.rank}.txt").open("w") as file:
            beat = heartbeat.current()
            file.write(f"rank {self.rank}: {beat.phase} for {beat.seconds:.0f} s\n\nmain thread:\n")
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            file.writelines(traceback.format_stack(frame))
            file.write("\nall threads, innermost call first:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def describe(found: Mapping[int, Whereabouts], world_size: int, limit_seconds: float, folder: Path) -> str:
    """One line that names who is behind, then where each rank is."""
    silent = [rank for rank in range(world_size) if rank not in found]
    least = min((where.number for where in found.values()), default=0)
    behind = [rank for rank, where in found.items() if where.number == least]
    if len(behind) == len(found):
        behind = [rank for rank, where in found.items() if not where.waits] or behind
    if silent:
        cause = f"{_named(silent)} gave no answer: stopped, or on a machine that is away"
    elif len(behind) < len(found):
        cause = f"the others wait for {_named(behind)}, in {found[behind[0]].phase}"
    else:
        cause = f"all ranks are in {found[behind[0]].phase}"
    lines = [
        f"hung: a phase took longer than {limit_seconds:g} s (trainer.timeout_minutes); {cause}; every rank's stack is "
        f"in {folder}"
    ]
    shown = sorted(found, key=lambda rank: (found[rank].number, rank))[:_SHOWN]
    lines += [f"  rank {r}: {found[r].phase} for {found[r].seconds:.0f} s, at {found[r].frame}" for r in shown]
    lines += [f"  and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "\n".join(lines)


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:_SHOWN])
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{', …' if len(ranks) > _SHOWN else ''}"


def _innermost(thread: threading.Thread) -> tuple[str, bool]:
    """The innermost frame of a thread, with the innermost of this package where that is another; and whether it waits
    in a collective.
    """
    frame: Any = sys._current_frames().get(thread.ident or 0)
    stack = traceback.extract_stack(frame) if frame is not None else []
    named = [f"{Path(entry.filename).name}:{entry.lineno} {entry.name}" for entry in stack]
    ours = [name for entry, name in zip(stack, named, strict=True) if "megatron_aligndistil" in entry.filename]
    if not named:
        return "nowhere", False
    shown = named[-1] if not ours or ours[-1] == named[-1] else f"{named[-1]} of {ours[-1]}"
    return shown, Path(stack[-1].filename).match("torch/distributed/*.py")
