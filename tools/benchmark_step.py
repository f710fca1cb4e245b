"""Tokens a second and peak memory of an AlignDistil training step: this package against plain transformers.

    python tools/benchmark_step.py --model <Hugging Face folder of SmolLM2-135M> --dtype bf16

Both sides take the same weights, tokens, micro-batches, loss, clipping and AdamW on the same machine; steps alternate
between two processes. docs/benchmarks.md says what is on each side. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import tqdm
from benchmarking import rows as tables
from benchmarking.rows import Row
from benchmarking.step_problem import StepProblem, StepReply, make_models
from benchmarking.step_sides import SIDES
from benchmarking.workers import Failed, Work, Workers

from megatron_aligndistil.errors import ConfigError, UserError

COLUMNS = {
    "implementation": ("implementation", "s"),
    "dtype": ("dtype", "s"),
    "seconds": ("seconds", ".4g"),
    "tokens/s": ("tokens_per_second", ".1f"),
    "peak MiB": ("peak_mib", ".0f"),
    "of it the step's MiB": ("extra_mib", ".0f"),
    "first loss": ("loss", ".7g"),
}


def measure(problem: StepProblem, threads: int, repeats: int) -> list[Row]:
    """A row for each side: a warm-up, ``repeats`` timed steps in turn, memory in fresh processes."""

    def workers(name: str) -> Workers:
        return Workers(Work(functools.partial(SIDES[name], problem), threads=threads), method="spawn")

    replies: dict[str, list[StepReply]] = {name: [] for name in SIDES}
    errors: dict[str, str] = {}
    title = f"{problem.rows} x {problem.length} tokens, {'bf16' if problem.bf16 else 'fp32'}"
    with tqdm.tqdm(total=len(SIDES) * (2 + repeats), desc=title, file=sys.stderr) as progress:

        def ask(name: str, processes: Workers, command: str) -> None:
            progress.set_postfix_str(f"{name} {command}")
            try:
                replies[name].append(processes.ask(command)[0])
            except Failed as failure:
                errors[name] = str(failure)
            progress.update()

        running = {name: workers(name) for name in SIDES}
        try:
            for turn in range(1 + repeats):
                for name, processes in running.items():
                    ask(name, processes, "warm_up" if turn == 0 else "time")
        finally:
            for processes in running.values():
                processes.close()
        for name in SIDES:
            fresh = workers(name)
            ask(name, fresh, "memory")
            fresh.close()
    return [_row(name, problem, threads, replies[name]) | {"error": errors.get(name)} for name in SIDES]


def _row(name: str, problem: StepProblem, threads: int, replies: Sequence[StepReply]) -> Row:
    times = [reply.seconds for reply in replies if reply.seconds is not None]
    losses = [reply.loss for reply in replies if reply.loss is not None]
    memory = next((reply for reply in replies if reply.peak_bytes is not None), StepReply())
    seconds = statistics.median(times) if times else None
    peak, resident = memory.peak_bytes, memory.resident_bytes
    return {
        "implementation": name,
        "dtype": "bf16" if problem.bf16 else "fp32",
        "rows": problem.rows,
        "length": problem.length,
        "response_share": problem.response_share,
        "micro_batch": problem.micro_batch,
        "recompute": problem.recompute,
        "seconds": seconds,
        "tokens_per_second": problem.rows * problem.length / seconds if seconds else None,
        "peak_bytes": peak,
        "extra_bytes": peak - resident if peak is not None and resident is not None else None,
        "loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "repeats": len(times),
        "threads": threads,
        "device": tables.device_line("cuda" if torch.cuda.is_available() else "cpu"),
        "versions": tables.versions(),
    }


def comparison(rows: Sequence[Row]) -> list[str]:
    """What this package's step is to the plain one, a line a type."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        ours, plain = (next(r for r in rows if (r["implementation"], r["dtype"]) == (name, dtype)) for name in SIDES)
        if ours["error"] or plain["error"]:
            continue
        lines.append(
            f"{dtype}: {plain['seconds'] / ours['seconds']:.2f} x the speed, "
            f"{ours['peak_bytes'] / plain['peak_bytes']:.2f} x the peak memory "
            f"({ours['extra_bytes'] / plain['extra_bytes']:.2f} x beyond what is resident between steps); "
            f"losses differ by {abs(ours['loss'] / plain['loss'] - 1):.1e} before the first step, "
            f"{abs(ours['last_loss'] / plain['last_loss'] - 1):.1e} after the last"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER", help="the policy: random in SmolLM2-135M's architecture")
    parser.add_argument("--teachers", nargs=2, default=[], metavar=("DPO", "REVERSE"), help="the policy with noise")
    parser.add_argument("--rows", type=int, default=8, help="sequences of the batch: 8")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence: 512")
    parser.add_argument("--prompt", type=int, default=128, help="of them the prompt's: 128")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences that go through a model at once: 8")
    parser.add_argument(
        "--recompute", choices=["none", "ours", "both"], default="none", help="whose layers' activations are recomputed"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), action="append", help="may be given twice: fp32")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each: 5")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="the rows as a list: printed, or to a file"
    )
    parser.add_argument("--csv", metavar="FILE", help="write the rows as CSV")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name in ("rows", "micro_batch", "repeats", "threads", "prompt"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: want at least 1")
    if arguments.prompt >= arguments.length:
        raise ConfigError(f"--prompt={arguments.prompt}: want fewer tokens than --length={arguments.length}")
    for folder in filter(None, [arguments.model, *arguments.teachers]):
        if not (Path(folder) / "config.json").exists():
            raise ConfigError(f"{folder}: no config.json in it; want a Hugging Face model folder")


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        _check(arguments)
    except UserError as error:
        print(f"benchmark_step: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-step-") as folder:
        models = make_models(Path(folder), arguments.model, arguments.teachers)
        for dtype in arguments.dtype or ["fp32"]:
            problem = StepProblem(
                models,
                arguments.rows,
                arguments.length,
                arguments.prompt,
                arguments.micro_batch,
                bf16=dtype == "bf16",
                recompute=arguments.recompute,
            )
            rows += measure(problem, arguments.threads, arguments.repeats)
    if arguments.json:
        tables.write_json(rows, arguments.json)
    if arguments.csv:
        tables.write_csv(rows, arguments.csv)
    if arguments.json != "-":
        in_units = [row | _mebibytes(row) for row in rows]
        tables.print_table(in_units, COLUMNS)
        print("\n".join(comparison(rows)))
    return 0


def _mebibytes(row: Row) -> Row:
    return {
        f"{name}_mib": None if row[f"{name}_bytes"] is None else row[f"{name}_bytes"] / 2**20
        for name in ("peak", "extra")
    }


if __name__ == "__main__":
    sys.exit(main())
