"""The benchmark programs on tiny problems: what they print and refuse, and that both sides compute the same loss."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import save_tiny

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
LIMIT_SECONDS = 200
SHAPE = "48,32,1000"
TWO_TEACHERS = ("ours", "ours_store", "ours_recompute", "ours_with_scalars", "authors", "local_shard_eager")
ONE_TEACHER = ("ours_reverse_kl", "authors_reverse_kl")
VALUES = ("loss", "hidden_gradient_norm", "weight_gradient_norm")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of ``tools`` (or ``-c``) with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": f"{TOOLS}:{ROOT}"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_SECONDS, check=False)


def kernel_rows(*arguments: str) -> dict[str, dict[str, Any]]:
    """By implementation, the rows of a run on SHAPE."""
    program = str(TOOLS / "benchmark_kernels.py")
    finished = python(program, "--shape", SHAPE, "--repeats", "2", *arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    return {row["implementation"]: row for row in json.loads(finished.stdout)}


def implementations(*names: str) -> tuple[str, str]:
    return "--implementations", ",".join(names)


@pytest.fixture(scope="module")
def fp32_rows(tmp_path_factory):
    target = tmp_path_factory.mktemp("benchmark") / "kernels.csv"
    names = ("five_products", *TWO_TEACHERS, *ONE_TEACHER)
    return kernel_rows("--dtype", "fp32", *implementations(*names), "--csv", str(target)), target


def test_every_row_is_measured(fp32_rows):
    rows, _ = fp32_rows
    assert list(rows) == ["five_products", *TWO_TEACHERS, *ONE_TEACHER]
    for row in rows.values():
        assert row["error"] is None
        assert (row["shape"], row["dtype"]) == (SHAPE, "fp32")
        assert row["seconds"] > 0 and row["extra_bytes"] >= 0
        assert row["flops_per_second"] == pytest.approx(row["products"] * 2 * 48 * 32 * 1000 / row["seconds"])
    assert rows["five_products"]["times_bare_products"] == 1
    ours, yardstick = rows["ours_reverse_kl"], rows["five_products"]
    assert ours["times_bare_products"] == pytest.approx(ours["seconds"] / yardstick["seconds"] * 5 / 4)


@pytest.mark.parametrize(("names", "reference"), [(TWO_TEACHERS, "authors"), (ONE_TEACHER, "authors_reverse_kl")])
def test_implementations_compute_the_same(fp32_rows, names, reference):
    rows, _ = fp32_rows
    for name in names:
        for value in VALUES:
            assert rows[name][value] == pytest.approx(rows[reference][value], rel=1e-5), (name, value)


def test_csv_has_the_rows(fp32_rows):
    rows, target = fp32_rows
    with target.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["implementation"] for row in written] == list(rows)
    for row in written:
        assert float(row["seconds"]) == pytest.approx(rows[row["implementation"]]["seconds"], rel=1e-5)
        assert row["device"] and "torch" in row["versions"]


def test_bf16_rows():
    rows = kernel_rows("--dtype", "bf16", *implementations("five_products", "ours", "authors"))
    assert rows["ours"]["loss"] == pytest.approx(rows["authors"]["loss"], rel=1e-2)
    tried = rows["five_products"]["quarter_vocabulary_seconds"]
    assert {name.split(",")[0] for name in tried} == {"bfloat16", "float32"}


def test_two_ranks_compute_what_one_does(fp32_rows):
    names = ("five_products", "ours", "ours_with_scalars", "local_shard_eager", "ours_reverse_kl", "authors")
    rows = kernel_rows("--dtype", "fp32", "--tensor-parallel", "2", *implementations(*names))
    whole, _ = fp32_rows
    for name in names[1:-1]:
        assert rows[name]["error"] is None
        for value in VALUES:
            assert rows[name][value] == pytest.approx(whole[name][value], rel=1e-5), (name, value)
    assert rows["authors"]["error"] == "it has no tensor-parallel form"
    assert rows["authors"]["seconds"] is None


@pytest.mark.parametrize("name", ["liger", "modelopt"])
def test_peer_is_measured_or_says_why_not(name):
    """Without the bench extra this takes the row's reason, with it the peer's value."""
    if name == "liger" and importlib.util.find_spec("liger_kernel"):
        pytest.skip("it compiles: test_compiled_implementations runs it")
    row = kernel_rows("--dtype", "fp32", *implementations(name))[name]
    if importlib.util.find_spec("liger_kernel" if name == "liger" else name):
        reference = kernel_rows("--dtype", "fp32", *implementations("authors_reverse_kl"))["authors_reverse_kl"]
        assert row["error"] is None
        assert [row[value] for value in VALUES] == pytest.approx([reference[value] for value in VALUES], rel=1e-5)
    else:
        assert row["error"].endswith("install the bench extra")
        assert row["seconds"] is None and row["extra_bytes"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reference"), [("authors_compiled", "authors"), ("liger", "authors_reverse_kl")])
def test_compiled_implementations(name, reference):
    if name == "liger":
        pytest.importorskip("liger_kernel")
    rows = kernel_rows("--dtype", "fp32", *implementations(name, reference))
    assert rows[name]["error"] is None
    assert [rows[name][v] for v in VALUES] == pytest.approx([rows[reference][v] for v in VALUES], rel=1e-4)


@pytest.mark.parametrize(
    ("program", "arguments", "named"),
    [
        ("benchmark_kernels.py", ["--implementations", "ours,theirs"], "--implementations=theirs"),
        ("benchmark_kernels.py", ["--shape", "8,8,9", "--tensor-parallel", "2"], "--shape=8,8,9"),
        ("benchmark_kernels.py", ["--repeats", "0"], "--repeats=0"),
        ("benchmark_kernels.py", ["--append"], "--append"),
        ("benchmark_step.py", ["--model", "/nowhere"], "/nowhere"),
        ("benchmark_step.py", ["--prompt", "512"], "--prompt=512"),
    ],
)
def test_bad_argument_is_one_line(program, arguments, named):
    finished = python(str(TOOLS / program), *arguments)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(program.removesuffix(".py")) and named in line


def test_meter_sees_what_a_call_takes():
    """Memory that was freed before the call must not hide what the call takes: 48 MiB at a time, in small pieces."""
    program = """
import torch
from benchmarking import meter
meter.return_freed_memory()
def take(piece_bytes):
    return [torch.ones(piece_bytes, dtype=torch.uint8) for _ in range((48 << 20) // piece_bytes)]
cpu = torch.device("cpu")
take(1 << 20)
for piece_bytes in (48 << 20, 1 << 20, 96 << 10):
    take(piece_bytes)
    print(meter.peak(lambda: take(piece_bytes), cpu).extra)
kept = take(1 << 20)
print(meter.peak(lambda: None, cpu).extra)
"""
    finished = python("-c", program)
    assert finished.returncode == 0, finished.stderr
    *taken, idle = [int(line) / 2**20 for line in finished.stdout.split()]
    assert taken == pytest.approx([48] * 3, rel=0.05)  # pages and glibc's headers
    assert idle < 1


def test_a_process_that_is_killed_is_reported():
    program = """
import os, signal
from benchmarking.workers import Failed, Work, Workers
class Subject:
    def fall(self): os.kill(os.getpid(), signal.SIGKILL)
    def fail(self): raise RuntimeError("first line\\nsecond line")
for command in ("fall", "fail"):
    workers = Workers(Work(lambda rank: Subject(), ranks=1))
    for attempt in range(2):
        try:
            workers.ask(command)
        except Failed as failure:
            print(failure)
"""
    finished = python("-c", program)
    assert finished.returncode == 0, finished.stderr
    killed = "the process ended with code -9 (killed, most likely for lack of memory)"
    assert finished.stdout.splitlines() == [killed, killed, *["RuntimeError: first line"] * 2]


def test_rows_measured_again_replace_earlier_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    from benchmarking.rows import merged

    earlier = [
        {"name": "a", "seconds": 1.0, "extra_bytes": 5, "error": "no memory"},
        {"name": "b", "seconds": 2.0, "extra_bytes": 6, "error": None},
    ]
    now = [{"name": "a", "seconds": None, "extra_bytes": 7, "error": None}, {"name": "c", "seconds": 3.0}]
    assert merged(earlier, now, ["name"]) == [
        {"name": "a", "seconds": 1.0, "extra_bytes": 7, "error": None},
        earlier[1],
        {"name": "c", "seconds": 3.0, "error": None},
    ]


def test_plot_is_drawn(fp32_rows, tmp_path):
    _, source = fp32_rows
    target = tmp_path / "kernels.svg"
    program = """
import sys
from benchmarking import figures, rows
figures.plot_kernels(rows.read_csv(sys.argv[1]), sys.argv[2])
"""
    finished = python("-c", program, str(source), str(target))
    assert finished.returncode == 0, finished.stderr
    assert "</svg>" in target.read_text()


def test_step_is_the_same_on_both_sides(tmp_path):
    model = save_tiny(tmp_path, "llama-tied")
    sizes = ["--rows", "4", "--length", "16", "--prompt", "4", "--micro-batch", "2", "--repeats", "1"]
    finished = python(str(TOOLS / "benchmark_step.py"), "--model", str(model), *sizes, "--json")
    assert finished.returncode == 0, finished.stderr
    ours, plain = json.loads(finished.stdout)
    assert [ours["implementation"], plain["implementation"]] == ["ours", "plain"]
    for row in (ours, plain):
        assert row["error"] is None
        assert row["tokens_per_second"] == pytest.approx(4 * 16 / row["seconds"])
        assert row["response_share"] == 0.75
        assert row["peak_bytes"] >= row["extra_bytes"] >= 0
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert ours["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-5)
    assert ours["last_loss"] != ours["loss"]
