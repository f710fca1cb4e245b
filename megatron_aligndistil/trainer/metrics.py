"""Adding up micro-batches' losses and metrics, over ranks too."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_aligndistil.parallel import collectives, groups, heartbeat
from megatron_aligndistil.types import Batch, LossOutput

_BYTES_PER_GIB = 1024**3


@dataclass
class Totals:
    """Running sums of a step or a validation pass on this rank; only metrics ranks put something in."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, outputs: Iterable[LossOutput], batches: Iterable[Batch]) -> None:
        """Add the losses of micro-batches, and their tokens."""
        if not groups.is_metrics_rank():
            return
        for output, batch in zip(outputs, batches, strict=True):
            device = output.total.device
            count = torch.tensor(float(output.count), device=device)
            pairs = {"loss": (output.total.detach(), count), **output.sums}
            for name, (numerator, denominator) in pairs.items():
                self._add(f"{name}/numerator", numerator.double())
                self._add(f"{name}/denominator", denominator.double())
            self._add("tokens", (batch.sequence_ids >= 0).sum().double().to(device))
            self._add("response_tokens", batch.loss_mask.sum().double().to(device))
            for name, value in output.maxima.items():
                known = self.maxima.get(name)
                self.maxima[name] = value.double() if known is None else torch.maximum(known, value.double())

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


class WorldMetrics:
    """Reduces totals over the world. Ranks exchange the names of a phase's metrics the first time only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._names: dict[str, tuple[list[str], list[str]]] = {}

    def reduce(self, phase: str, totals: Totals) -> dict[str, float]:
        """The world's metrics, the same on every rank: means, maxima, token counts."""
        if phase not in self._names:
            known = collectives.gather_objects((list(totals.sums), list(totals.maxima)))
            self._names[phase] = (
                sorted(set().union(*(sums for sums, _ in known))),
                sorted(set().union(*(maxima for _, maxima in known))),
            )
        sum_names, max_names = self._names[phase]
        sums = self._all_reduce(sum_names, totals.sums, 0.0, ReduceOp.SUM)
        metrics = self._all_reduce(max_names, totals.maxima, -float("inf"), ReduceOp.MAX)
        for name, value in sums.items():
            base, _, part = name.partition("/")
            if part == "numerator":
                denominator = sums[f"{base}/denominator"]
                if denominator or base == "loss":  # a step may hold nothing that another metric is a mean of
                    metrics[base] = value / denominator if denominator else float("nan")
            elif not part:
                metrics[base] = value
        return metrics

    def _all_reduce(
        self, names: list[str], values: Mapping[str, Tensor], absent: float, operation: ReduceOp.RedOpType
    ) -> dict[str, float]:
        if not names:
            return {}
        missing = torch.tensor(absent, dtype=torch.float64, device=self.device)
        packed = torch.stack([values.get(name, missing) for name in names])
        dist.all_reduce(packed, op=operation)
        return dict(zip(names, packed.tolist(), strict=True))


class PhaseClock:
    """Seconds that each phase of a step took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under ``<name>_seconds``, waiting for the device at its end."""
        heartbeat.beat(name)
        start = time.perf_counter()
        yield
        torch.cuda.synchronize()
        heartbeat.beat(f"after {name}")
        key = f"{name}_seconds"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


def peak_memory_gib() -> float:
    """This process's peak: of the GPU where there is one, of resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _BYTES_PER_GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _BYTES_PER_GIB
