"""A reader under fuzzing: how many malformed inputs it gets, what it may answer, and what became of all of them.

An input is *accepted* (the reader returned) or *refused cleanly*: a UserError whose message, its white space folded,
is one short line that names the place. Anything else fails the test, and Hypothesis shrinks the input.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from megatron_aligndistil.errors import UserError
from megatron_aligndistil.launch.failures import one_line

QUICK = 400  # inputs of all readers together where FUZZ_INPUTS isn't set
TOTAL = int(os.environ.get("FUZZ_INPUTS", QUICK))
SECONDS = 20.0  # of one input: what this process computes, and
WAITING_SECONDS = 120.0  # what passes, on a machine that others may use too
MEMORY = 4 << 30  # bytes that one input may add to the address space
LONGEST_LINE = 2000  # characters of a message, beside the paths in it
FORM = "fuzz"  # the name of a tally among a test's user properties

# The share of TOTAL, in some thousandths, that each reader gets: the cheap ones more.
SHARES = {
    "overrides": 30,
    "own YAML": 20,
    "analysis and certify settings": 20,
    "NeMo files": 10,
    "rows": 220,
    "JSONL and Parquet files": 40,
    "tokenized cache": 25,
    "chat templates": 30,
    "tokenizer folders": 25,
    "config.json": 50,
    "safetensors": 130,
    "safetensors index": 60,
    "GGUF": 30,
    "PEFT folders": 80,
    "metadata files": 30,
    "state.json": 60,
    "manifest.json": 60,
    "rollout.safetensors": 60,
    "checkpoint index": 90,
    "checkpoint folders": 25,
    "resuming": 10,
    "metrics.jsonl": 60,
    "benchmark folders": 10,
    "ready answers": 20,
    "judges' replies": 20,
}


class TooSlow(BaseException):
    """An input took longer than SECONDS; no ``except Exception`` of a library hides it."""


@dataclass
class Tally:
    """What became of a reader's inputs."""

    reader: str
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    slowest: float = 0.0

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused + self.failed

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "inputs": self.inputs}


class Reader:
    """Runs a reader on inputs and counts. ``name`` is one of SHARES."""

    def __init__(self, name: str) -> None:
        self.tally = Tally(name)
        self.inputs = max(4, round(TOTAL * SHARES[name] / 1000))

    def read(self, call: Callable[[], Any], *places: object) -> Any:
        """What ``call`` returns, or the folded line of its refusal, which holds one of ``places`` (any if none given).

        Raises:
            AssertionError: the refusal isn't clean.
            Exception: whatever else the reader raised.
        """
        start = time.process_time()
        answer: Any = None
        kind = "failed"
        try:
            with limited():
                answer = call()
            kind = "accepted"
        except UserError as error:
            answer = one_line(error)
            assert_clean(answer, places)
            kind = "refused"
        finally:
            setattr(self.tally, kind, getattr(self.tally, kind) + 1)
            self.tally.slowest = max(self.tally.slowest, time.process_time() - start)
        return answer

    def fuzz(self, strategy: SearchStrategy[Any], check: Callable[[Any], object]) -> Tally:
        """``check`` on the reader's share of the strategy's inputs; always the same ones in the quick share."""
        quick = TOTAL <= QUICK
        phases = [Phase.generate] if quick else [Phase.generate, Phase.shrink]

        @settings(
            max_examples=self.inputs,
            database=None,
            deadline=None,
            derandomize=quick,
            phases=phases,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def run(value: Any) -> None:
            check(value)

        run()
        assert self.tally.inputs >= min(self.inputs, 4)
        return self.tally


def assert_clean(line: str, places: tuple[object, ...]) -> None:
    """One line of bounded length, without a traceback, that names a place."""
    assert line.strip(), "an empty message"
    assert "Traceback" not in line and 'File "' not in line, line
    named = [str(place) for place in places if str(place) in line]
    assert named or not places, f"names none of {[str(place) for place in places]}: {line}"
    rest = line
    for place in sorted(named, key=len, reverse=True):
        rest = rest.replace(place, "")
    assert len(rest) <= LONGEST_LINE, f"{len(rest)} characters: {line[:300]}…"


@contextmanager
def limited() -> Iterator[None]:
    """Bounds on the time and the memory of what is inside."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    timers = {signal.SIGALRM: (signal.ITIMER_REAL, WAITING_SECONDS), signal.SIGPROF: (signal.ITIMER_PROF, SECONDS)}
    handlers = {number: signal.signal(number, _too_slow) for number in timers}
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, handlers[number])
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_slow(number: int, frame: object) -> None:
    raise TooSlow(f"no answer after {SECONDS:g} s of computing, or {WAITING_SECONDS:g} s of waiting")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the bad-input table."""
    header = f"{'reader':<32}{'inputs':>8}{'accepted':>10}{'clean errors':>14}{'tracebacks':>12}{'slowest':>10} s"
    lines = [header, "-" * len(header)]
    total = Tally("together")
    for row in rows:
        own = Tally(**{key: value for key, value in row.items() if key != "inputs"})
        lines.append(_line(own))
        total.accepted += own.accepted
        total.refused += own.refused
        total.failed += own.failed
        total.slowest = max(total.slowest, own.slowest)
    return [*lines, "-" * len(header), _line(total)]


def _line(tally: Tally) -> str:
    counts = f"{tally.inputs:>8,}{tally.accepted:>10,}{tally.refused:>14,}{tally.failed:>12,}"
    return f"{tally.reader:<32}{counts}{tally.slowest:>10.2f} s"
