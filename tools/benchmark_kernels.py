"""Time and memory of AlignDistil's loss and its gradients: this package's kernels, the plain form, other packages.

    python tools/benchmark_kernels.py --shape 2048,576,49152 --shape 1024,1536,151936 --dtype bf16 --dtype fp32

Every implementation gets the same three hidden states and heads. Times are medians of calls that alternate between the
implementations, each in a process of its own; memory is a fresh process's peak beyond what was there before the call.
docs/benchmarks.md says what each row is. Nothing here needs a GPU; where there is one it is used.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import tqdm
from benchmarking import rows as tables
from benchmarking.implementations import IMPLEMENTATIONS, YARDSTICK
from benchmarking.problem import DTYPES, Problem, Shape
from benchmarking.rows import Row
from benchmarking.subject import Reply, Subject
from benchmarking.workers import Failed, Work, Workers

from megatron_aligndistil.errors import ConfigError, UserError

KEYS = ("implementation", "shape", "dtype", "tensor_parallel", "threads", "device")
COLUMNS = {
    "implementation": ("implementation", "s"),
    "T,H,V": ("shape", "s"),
    "dtype": ("dtype", "s"),
    "TP": ("tensor_parallel", "d"),
    "seconds": ("seconds", ".4g"),
    "x bare products": ("times_bare_products", ".3f"),
    "GFLOP/s": ("gflops", ".4g"),
    "extra MiB": ("extra_mib", ".1f"),
}


@dataclass
class Measured:
    """What was learnt of one implementation on one problem."""

    first: Reply = field(default_factory=Reply)
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Case:
    """One problem and how it is run."""

    shape: Shape
    dtype: str
    tensor_parallel: int
    threads: int
    device: str

    def subject(self, name: str, shared: Problem | None, rank: int) -> Subject:
        """The implementation ``name`` in this process, on rank ``rank``'s shard."""
        problem = shared or self.problem()
        if self.tensor_parallel > 1:
            assert torch.distributed.group.WORLD is not None
            problem = problem.shard(rank, torch.distributed.group.WORLD)
        return Subject(IMPLEMENTATIONS[name], problem)

    def problem(self) -> Problem:
        return Problem.make(self.shape, DTYPES[self.dtype], torch.device(self.device))

    def workers(self, name: str, shared: Problem | None) -> Workers:
        """Its process, or one a rank; the threads are shared out."""
        threads = max(1, self.threads // self.tensor_parallel)
        make = functools.partial(self.subject, name, shared)
        # Forked processes share the problem; CUDA can't be used in one.
        method = "fork" if self.device == "cpu" else "spawn"
        return Workers(Work(make, self.tensor_parallel, threads, self.device), method)


def measure(case: Case, names: Sequence[str], repeats: int, what: str) -> dict[str, Measured]:
    """Time (``what`` time or both), then memory (memory or both), of every implementation."""
    found = {name: Measured() for name in names}
    for name in names:
        if case.tensor_parallel > 1 and not IMPLEMENTATIONS[name].sharded:
            found[name].error = "it has no tensor-parallel form"
    calls = (what != "memory") * (1 + repeats) + (what != "time")
    shared = case.problem() if case.device == "cpu" else None
    title = f"{case.shape} {case.dtype} TP={case.tensor_parallel}"
    with tqdm.tqdm(total=calls * len(names), desc=title, file=sys.stderr) as progress:
        if what != "memory":
            _times(case, shared, found, repeats, progress)
        if what != "time":
            _memory(case, shared, found, progress)
    return found


def _times(
    case: Case, shared: Problem | None, found: dict[str, Measured], repeats: int, progress: tqdm.tqdm[None]
) -> None:
    workers = {name: case.workers(name, shared) for name, measured in found.items() if measured.error is None}
    try:
        for turn in range(1 + repeats):
            for name, measured in found.items():
                progress.set_postfix_str(f"{name} {'warm-up' if turn == 0 else f'{turn}/{repeats}'}")
                if measured.error is None:
                    try:
                        if turn == 0:
                            measured.first = workers[name].ask("warm_up")[0]
                        else:
                            measured.seconds.append(max(reply.seconds for reply in workers[name].ask("time")))
                    except Failed as failure:
                        measured.error = str(failure)
                progress.update()
    finally:
        for processes in workers.values():
            processes.close()


def _memory(case: Case, shared: Problem | None, found: dict[str, Measured], progress: tqdm.tqdm[None]) -> None:
    for name, measured in found.items():
        progress.set_postfix_str(f"{name} memory")
        if measured.error is None:
            workers = case.workers(name, shared)
            try:
                measured.extra_bytes = max(reply.extra_bytes for reply in workers.ask("memory"))
            except Failed as failure:
                measured.error = str(failure)
            finally:
                workers.close()
        progress.update()


def rows_of(case: Case, found: dict[str, Measured], repeats: int) -> list[Row]:
    """The result's rows. FLOP are those that the loss takes at the least, whoever computes more."""
    yardstick = _median(found[YARDSTICK].seconds) if YARDSTICK in found else None
    made = []
    for name, measured in found.items():
        products = IMPLEMENTATIONS[name].products
        seconds = _median(measured.seconds)
        flops = products * case.shape.product_flops()
        row: Row = {
            "implementation": name,
            "shape": str(case.shape),
            "dtype": case.dtype,
            "tensor_parallel": case.tensor_parallel,
            "seconds": seconds,
            "extra_bytes": measured.extra_bytes,
            "products": products,
            "flops_per_second": flops / seconds if seconds else None,
            "times_bare_products": seconds / (yardstick * products / 5) if seconds and yardstick else None,
            "loss": measured.first.loss,
            "hidden_gradient_norm": measured.first.hidden_gradient_norm,
            "weight_gradient_norm": measured.first.weight_gradient_norm,
            "variant": measured.first.variant,
            "quarter_vocabulary_seconds": measured.first.trials or None,
            "repeats": repeats,
            "threads": case.threads,
            "device": tables.device_line(case.device),
            "versions": tables.versions(),
            "error": measured.error,
        }
        made.append(row)
    return made


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _shape(text: str) -> Shape:
    try:
        tokens, hidden, vocab = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKENS,HIDDEN,VOCAB, such as 1024,1536,151936") from None
    return Shape(tokens, hidden, vocab)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=_shape, action="append", metavar="T,H,V", help="may be given several times")
    parser.add_argument("--tokens", type=int, default=1024, help="T where no --shape is given: 1024")
    parser.add_argument("--hidden", type=int, default=1536, help="H where no --shape is given: 1536")
    parser.add_argument("--vocab", type=int, default=151936, help="V where no --shape is given: 151936")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of hidden states and heads: bf16")
    parser.add_argument("--implementations", metavar="A,B", help="default: all that run at this tensor parallelism")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks, each with V / N entries: 1")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each: 5")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all ranks")
    parser.add_argument("--measure", choices=("both", "time", "memory"), default="both", help="what to measure: both")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="the rows as a list: printed, or to a file"
    )
    parser.add_argument("--csv", metavar="FILE", help="write the rows as CSV")
    parser.add_argument("--append", action="store_true", help="keep the CSV's rows that weren't measured again")
    parser.add_argument("--plot", metavar="FILE", help="draw the CSV's rows (SVG, PNG, PDF by the file's name)")
    return parser


def _checked(arguments: argparse.Namespace) -> tuple[list[Shape], list[str]]:
    """Shapes and implementations.

    Raises:
        ConfigError: an argument that can't be meant.
    """
    shapes = arguments.shape or [Shape(arguments.tokens, arguments.hidden, arguments.vocab)]
    ranks = arguments.tensor_parallel
    for name in ("tensor_parallel", "repeats", "threads"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: want at least 1")
    for shape in shapes:
        if min(shape.tokens, shape.hidden, shape.vocab) < 1 or shape.vocab % ranks:
            raise ConfigError(f"--shape={shape}: want positive numbers and a vocabulary that {ranks} ranks divide")
    default = [name for name, implementation in IMPLEMENTATIONS.items() if ranks == 1 or implementation.sharded]
    names = arguments.implementations.split(",") if arguments.implementations else default
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown:
        raise ConfigError(f"--implementations={unknown[0]}: unknown; there are {', '.join(IMPLEMENTATIONS)}")
    if arguments.append and not arguments.csv:
        raise ConfigError("--append: there is no --csv to append to")
    return shapes, list(dict.fromkeys(names))


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        shapes, names = _checked(arguments)
    except UserError as error:
        print(f"benchmark_kernels: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # a thread pool here would not survive in forked workers
    tqdm.tqdm.monitor_interval = 0  # nor would its thread
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    for shape in shapes:
        for dtype in arguments.dtype or ["bf16"]:
            case = Case(shape, dtype, arguments.tensor_parallel, arguments.threads, device)
            rows += rows_of(case, measure(case, names, arguments.repeats, arguments.measure), arguments.repeats)
    _write(rows, arguments)
    return 0


def _write(rows: list[Row], arguments: argparse.Namespace) -> None:
    if arguments.json:
        tables.write_json(rows, arguments.json)
    if arguments.json != "-":
        in_units = [
            row
            | {"gflops": None if row["flops_per_second"] is None else row["flops_per_second"] / 1e9}
            | {"extra_mib": None if row["extra_bytes"] is None else row["extra_bytes"] / 2**20}
            for row in rows
        ]
        tables.print_table(in_units, COLUMNS)
    if arguments.csv:
        rows = tables.merged(tables.read_csv(arguments.csv), rows, KEYS) if arguments.append else rows
        tables.write_csv(rows, arguments.csv)
    if arguments.plot:
        from benchmarking.figures import plot_kernels

        plot_kernels(rows, arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
