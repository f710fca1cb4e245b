"""Time and peak memory of one call, in the process that makes it."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets the peak resident size to the present one
# mallopt(3)'s numbers, and from what size on freed memory goes back to the system at once.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
RETURNED_FROM_BYTES = 64 * 1024


def return_freed_memory() -> None:
    """Make glibc give freed tensors back, so that what one call freed can't hide what the next one takes."""
    libc = ctypes.CDLL(None)
    for parameter, value in (
        (M_ARENA_MAX, 1),
        (M_MMAP_THRESHOLD, RETURNED_FROM_BYTES),
        (M_TRIM_THRESHOLD, RETURNED_FROM_BYTES),
    ):
        if not libc.mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) is refused: memory can't be measured with this C library")


def trim() -> None:
    """Collect garbage and give the heap's free pages back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")


def resident_bytes() -> int:
    """Resident size of this process."""
    return _kilobytes("VmRSS") * 1024


def peak_resident_bytes() -> int:
    """The largest resident size since the last reset."""
    return _kilobytes("VmHWM") * 1024


def reset_peak() -> None:
    """Start ``peak_resident_bytes`` anew."""
    CLEAR_REFS.write_text(RESET_PEAK)


@dataclass(frozen=True)
class Peak:
    """Bytes before a call, and the most at any moment of it: resident memory, on a GPU what torch has allocated."""

    before: int
    highest: int

    @property
    def extra(self) -> int:
        """What the call took."""
        return max(0, self.highest - self.before)


def peak(call: Callable[[], object], device: torch.device) -> Peak:
    """Memory over ``call``."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return Peak(before, torch.cuda.max_memory_allocated())
    trim()
    before = resident_bytes()
    reset_peak()
    call()
    return Peak(before, peak_resident_bytes())


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of ``call``."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
