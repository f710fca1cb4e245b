"""Damage of any file of a checkpoint is noticed and named; what isn't damaged is not."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from megatron_aligndistil.checkpoint.integrity import DAMAGED, newest_sound
from megatron_aligndistil.checkpoint.manifest import MANIFEST, damage, read_manifest, write_manifest
from megatron_aligndistil.errors import CheckpointError
from tests.distributed.harness import run_ranks
from tests.unit.checkpoint.refusals import refusal


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_whole_checkpoint_passes_and_every_file_is_listed(checkpoint):
    assert damage(checkpoint) is None
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert set(read_manifest(checkpoint)) == files - {MANIFEST}


def test_one_flipped_bit_or_lost_byte_of_any_file_is_named(checkpoint):
    for name in [*read_manifest(checkpoint), MANIFEST]:
        path = checkpoint / name
        size, before = path.stat().st_size, path.read_bytes()
        for spoil in (partial(flip, path, size // 2), partial(os.truncate, path, size - 1), path.unlink):
            spoil()
            complaint = damage(checkpoint)
            assert complaint is not None and str(path) in complaint and "\n" not in complaint
            path.write_bytes(before)
    assert damage(checkpoint) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 100_000, '{"format": 2}', '{"format": 1, "files": 3}'])
def test_a_manifest_that_is_none(checkpoint, text):
    (checkpoint / MANIFEST).write_text(text)
    with refusal(MANIFEST, "damaged, or not a manifest"):
        read_manifest(checkpoint)


def test_ranks_share_the_reading_and_miss_nothing(checkpoint):
    for name in read_manifest(checkpoint):
        flip(checkpoint / name, 0)
        assert sum(damage(checkpoint, rank, 3) is not None for rank in range(3)) == 1
        flip(checkpoint / name, 0)


def choose(steps: list[Path], when_damaged: str) -> str:
    try:
        return newest_sound(steps, when_damaged).name
    except CheckpointError as error:
        return str(error)


def test_the_one_before_is_offered_or_taken(checkpoint):
    log_dir, steps = checkpoint.parent / "checkpoints", []
    for number in (1, 2, 3):
        steps.append(log_dir / f"step_{number}")
        (steps[-1] / "weights").mkdir(parents=True)
        for path in (checkpoint / "weights").iterdir():
            os.link(path, steps[-1] / "weights" / path.name)
        write_manifest(steps[-1])
    assert run_ranks(2, choose, steps, "stop") == ["step_3"] * 2
    (steps[2] / "weights" / "metadata.json").unlink()
    for said in run_ranks(2, choose, steps, "stop"):
        assert "metadata.json" in said and "when_damaged=previous goes on from step_2" in said
    assert run_ranks(2, choose, steps, "previous") == ["step_2"] * 2
    assert sorted(path.name for path in log_dir.iterdir()) == [f"{DAMAGED}step_3", "step_1", "step_2"]
    for step in steps[:2]:
        (step / MANIFEST).write_text("{}")
    for said in run_ranks(2, choose, steps[:2], "previous"):
        assert "every checkpoint in there is damaged" in said
