"""What saving costs a run: no checkpoints, written while training waits, in the background, and with or without hashes.

    python tools/benchmark_checkpoint.py --model <Hugging Face folder> --pairs <pairs.jsonl> [key=value ...]

Each variant is the same DPO run in a process of its own, several times in turn; timed from the end of the first step
to the end of the last save. docs/benchmarks.md says what was measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarking.rows import print_table

from megatron_aligndistil.checkpoint import training
from megatron_aligndistil.checkpoint.manifest import MANIFEST, record_of
from megatron_aligndistil.launch import cli
from megatron_aligndistil.trainer.loop import Trainer

_SAVING = "exp_manager.checkpoint_callback_params"
VARIANTS = {
    "no checkpoints": (f"{_SAVING}.every_n_train_steps=0", f"{_SAVING}.save_on_train_end=false"),
    "in the foreground, hashed": (f"{_SAVING}.async_save=false",),
    "in the background, hashed": (),
    "in the background, not hashed": (),
}
COLUMNS = {
    "variant": ("variant", "s"),
    "seconds a step": ("step_seconds", ".3f"),
    "share of step time, %": ("share", ".1f"),
    "training waits a save, s": ("wait_seconds", ".3f"),
}


def run_variant(name: str, arguments: list[str], steps: int) -> dict[str, float]:
    """One run in this process: seconds a step, and how long training waited for a save."""
    ends, waits = [], []
    fit_step, fit = Trainer._fit_step, Trainer.fit

    def timed_step(self: Trainer) -> None:
        fit_step(self)
        ends.append(time.perf_counter())

    def timed_fit(self: Trainer) -> None:
        fit(self)
        ends.append(time.perf_counter())

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "training waited" in record.msg:
                waits.append(float(record.args[1]))  # type: ignore[index, arg-type]

    Trainer._fit_step, Trainer.fit = timed_step, timed_fit  # type: ignore[method-assign]
    training.logger.addHandler(Waits())
    if name.endswith("not hashed"):
        training._hashed = lambda request, *_: request
        training.write_manifest = lambda checkpoint: (checkpoint / MANIFEST).write_text("{}")
    if code := cli.main(["train", *arguments, *VARIANTS[name]]):
        sys.exit(code)
    return {"step_seconds": (ends[-1] - ends[0]) / (steps - 1), "wait_seconds": statistics.mean(waits or [0.0])}


def _said(command: list[str]) -> str:
    finished = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(finished.returncode)  # its own line says why
    return finished.stdout


def hash_rate(folder: Path) -> tuple[float, float]:
    """GiB of the checkpoints in ``folder``, and GiB/s that one process hashes."""
    files = [path for path in folder.rglob("*.distcp")]
    start = time.perf_counter()
    gib = sum(record_of(path).bytes for path in files) / 2**30
    return gib / max(1, len({path.parent for path in files})), gib / (time.perf_counter() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--every", type=int, default=4, help="steps between two saves")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--log-dir", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        log_dir = Path(options.log_dir or folder)
        arguments = [
            *("--config-name", "dpo", f"model.restore_from_path={options.model}"),
            f"model.data.data_prefix.train=[{options.pairs}]",
            *(f"exp_manager.explicit_log_dir={log_dir}", f"{_SAVING}.every_n_train_steps={options.every}"),
            *(f"trainer.max_steps={options.steps}", "trainer.max_epochs=1000", f"{_SAVING}.save_top_k=1"),
            *options.overrides,
        ]
        if options.variant:
            print(json.dumps(run_variant(options.variant, arguments, options.steps)))
            return
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        size = rate = 0.0
        for repeat in range(options.repeats):
            for name in VARIANTS:
                there = Path(folder) / f"{repeat}_{list(VARIANTS).index(name)}"
                child = [sys.executable, *sys.argv, "--variant", name, "--log-dir", str(there)]
                said = _said(child)
                figures[name].append(json.loads(said.splitlines()[-1]))
                if name.endswith(", hashed"):
                    size, rate = hash_rate(there)
        rows = []
        for name, found in figures.items():
            step, wait = (statistics.median(f[key] for f in found) for key in ("step_seconds", "wait_seconds"))
            rows.append({"variant": name, "step_seconds": step, "wait_seconds": wait})
            rows[-1]["share"] = 100 * (step / rows[0]["step_seconds"] - 1)
        print_table(rows, COLUMNS)
        print(f"a checkpoint of {size:.3f} GiB every {options.every} steps; SHA-256 at {rate:.2f} GiB/s a process")


if __name__ == "__main__":
    main()
