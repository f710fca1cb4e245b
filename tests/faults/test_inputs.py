"""What a run is given breaks: weights, a batch, a data set between two starts, the clock; or it is not alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.fleet import Fleet, finished, wait_until
from tests.faults.setting import Setting
from tests.faults.table import record
from tests.integration.program import LIMIT_SECONDS, losses, run, start

STEPS = 10


def spoil_weights(model: Path, copy: Path, name: str, value: float, row: int) -> Path:
    """A copy of ``model`` with one row of a tensor replaced."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name][row] = torch.full_like(tensors[name][row], value)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def interrupted(setting: Setting, log_dir: Path, output: Path, *overrides: str, kind: str = "training") -> list[str]:
    """A run that was killed with a checkpoint; returns its arguments."""
    arguments = setting.arguments(kind, log_dir, STEPS, *overrides)
    fleet = Fleet.start(output, arguments)
    wait_until((log_dir / "checkpoints" / "step_00000004").exists, fleet)
    fleet.kill()
    return arguments


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_weights_that_are_not_numbers(setting: Setting, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = spoil_weights(setting.models["model"], tmp_path / "model", name, value, row=3)
    log_dir, before = tmp_path / "run", setting.arguments("training", tmp_path / "run", STEPS)
    fleet = Fleet.start(tmp_path / "output", [*before, f"model.restore_from_path={model}"])
    assert set(fleet.wait()) & {2}, fleet.errors()
    line = fleet.error_line()
    assert f"{model}: " in line and "is not finite" in line and "linear_fc1" in line, line
    assert losses(log_dir) == {}
    finished(tmp_path / "output", before)
    record(f"{value} in the weights", 1, 1, int(losses(log_dir) == setting.expected("training", STEPS)))


def test_a_batch_that_overflows(setting: Setting, tmp_path: Path) -> None:
    """One token's embedding is too large: the batch that holds it is refused each time, and nothing of it saved."""
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(setting.models["model"]).encode("Ω")[0]
    model = spoil_weights(setting.models["model"], tmp_path / "model", "model.embed_tokens.weight", 3e38, token)
    rows = setting.pairs.read_text().splitlines()
    spoilt = {**json.loads(rows[-1]), "chosen": "Ω"}
    (tmp_path / "pairs.jsonl").write_text("\n".join([*rows[:-1], json.dumps(spoilt, ensure_ascii=False)]))
    own = (f"model.restore_from_path={model}", f"model.data.data_prefix.train=[{tmp_path / 'pairs.jsonl'}]")
    lines = []
    for attempt in range(2):  # from the beginning, and from the last checkpoint before it
        log_dir = tmp_path / "run"
        fleet = Fleet.start(tmp_path / "output", setting.arguments("training", log_dir, 16, *own))
        assert set(fleet.wait()) & {2}, fleet.errors()
        lines.append(fleet.error_line())
        known = losses(log_dir)
        step = len(known) + 1
        if attempt == 0:
            first = known
        assert re.search(rf"is (nan|inf) at step {step}: ", lines[-1]) and str(log_dir / "nonfinite") in lines[-1]
        newest = max(int(path.name[5:]) for path in log_dir.glob("checkpoints/step_*"))
        assert newest < step
    record("a batch whose loss is not finite", 1, 1, int(first == known and lines[0] == lines[1]))


def test_a_data_set_that_was_replaced(setting: Setting, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    shutil.copy(setting.pairs, pairs)
    own = f"model.data.data_prefix.train=[{pairs}]"
    arguments = interrupted(setting, tmp_path / "run", tmp_path / "output", own)
    before = pairs.read_text()
    rows = before.splitlines()
    pairs.write_text("\n".join([rows[0].replace('"chosen": "', '"chosen": "a '), *rows[1:]]))
    fleet = Fleet.start(tmp_path / "output", arguments)
    assert fleet.wait() == [2, 2], fleet.errors()
    assert "state.json: train_fingerprint was" in fleet.error_line()
    pairs.write_text(before)
    finished(tmp_path / "output", arguments)
    identical = losses(tmp_path / "run") == setting.expected("training", STEPS)
    record("data set replaced before resuming", 1, 1, int(identical))


def test_two_runs_in_one_folder(setting: Setting, tmp_path: Path) -> None:
    log_dir = tmp_path / "run"
    arguments = setting.arguments("training", log_dir, STEPS)
    first = Fleet.start(tmp_path / "first", arguments)
    wait_until(lambda: len(losses(log_dir)) > 0, first)
    first_rank = first.ranks[0].pid
    second = Fleet.start(tmp_path / "second", arguments)
    assert set(second.wait()) & {2}, second.errors()
    assert f"another run is writing there (process {first_rank} on " in second.error_line()
    assert first.wait() == [0, 0], first.errors()
    identical = losses(log_dir) == setting.expected("training", STEPS)
    record("two runs in one log folder", 1, 1, int(identical))


# The time of day as a file says, for every call of a process; the monotonic clock stays as it is when a clock is set.
FAKE_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static time_t jump(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("CLOCK_JUMP"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}
"""
DAY = 86400


@pytest.mark.slow  # each look at the clock reads a file
def test_a_clock_that_jumps(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, offset, library = shutil.which("cc"), tmp_path / "offset", tmp_path / "clock.so"
    if compiler is None:
        pytest.skip("the false clock needs a C compiler")
    (tmp_path / "clock.c").write_text(FAKE_CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    offset.write_text(str(-DAY))
    monkeypatch.setenv("CLOCK_JUMP", str(offset))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    asked = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], capture_output=True, check=True)
    assert abs(float(asked.stdout) - (time.time() - DAY)) < 600
    log_dir = tmp_path / "run"
    arguments = ("train", *setting.arguments("training", log_dir, STEPS))
    offset.write_text("0")
    process, deadline = start(*arguments), time.monotonic() + LIMIT_SECONDS
    for seen, jump in ((2, -2 * DAY), (5, 400 * DAY)):  # while it runs
        while process.poll() is None and len(losses(log_dir)) < seen:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        offset.write_text(str(jump))
    while process.poll() is None and not (log_dir / "checkpoints" / "step_00000006").exists():
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    offset.write_text(str(-30 * DAY))  # and before it goes on
    assert run(*arguments).exit_code == 0
    identical = losses(log_dir) == setting.expected("training", STEPS)
    record("the clock jumps back and forth", 1, 1, int(identical))
