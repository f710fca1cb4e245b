"""Disks that fill up, folders that cannot be written, files that rot: one line, and the run goes on to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fleet import Fleet, finished, wait_until
from tests.faults.setting import Setting, ranks_of
from tests.faults.table import record
from tests.integration.program import losses

STEPS = 10
SAVED = "checkpoints/step_00000006"


def system(*command: str) -> bool:
    """Whether the command succeeded."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not system("mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)):
        pytest.skip("mounting a file system of a limited size needs root")
    yield folder
    system("umount", "-l", str(folder))


def shrink(disk: Path, left_kib: int) -> None:
    """Leave so much room on the disk, which the run goes on to fill meanwhile."""
    for _ in range(50):
        used = 1024 * 64 - shutil.disk_usage(disk).free // 1024
        if system("mount", "-o", f"remount,size={used + left_kib}k", str(disk)):
            return
    raise AssertionError("the disk fills faster than it is measured")


@pytest.mark.parametrize("left_kib", [0, pytest.param(64, marks=pytest.mark.slow)])
def test_a_full_disk(setting: Setting, tmp_path: Path, disk: Path, left_kib: int) -> None:
    expected, log_dir = setting.expected("training", STEPS), disk / "run"
    arguments = setting.arguments("training", log_dir, STEPS)
    fleet = Fleet.start(tmp_path / "output", arguments)
    wait_until((log_dir / "checkpoints" / "step_00000002").exists, fleet)
    shrink(disk, left_kib)
    codes = fleet.wait()
    assert set(codes) & {2}, (codes, fleet.errors())
    line = fleet.error_line()
    assert ("0.00 GiB are free there" in line or "No space left" in line) and str(log_dir) in line, line
    assert system("mount", "-o", "remount,size=64m", str(disk))
    finished(tmp_path / "output", arguments)
    record("full disk", 1, 1, int(losses(log_dir) == expected))


def test_a_folder_that_becomes_read_only(setting: Setting, tmp_path: Path) -> None:
    expected, log_dir = setting.expected("training", STEPS), tmp_path / "run"
    arguments = setting.arguments("training", log_dir, STEPS)
    fleet = Fleet.start(tmp_path / "output", arguments)
    folder = log_dir / "checkpoints"
    wait_until((folder / "step_00000002").exists, fleet)
    if not system("chattr", "+i", str(folder)):  # root writes wherever permissions alone forbid it
        fleet.kill()
        pytest.skip("this file system knows no immutable folders")
    try:
        assert set(fleet.wait()) & {2}, fleet.errors()
        assert f"{folder}" in fleet.error_line()
    finally:
        assert system("chattr", "-i", str(folder))
    finished(tmp_path / "output", arguments)
    record("read-only folder", 1, 1, int(losses(log_dir) == expected))


def test_a_log_folder_that_cannot_be_written(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fleet = Fleet.start(tmp_path / "output", setting.arguments("alone", tmp_path / "file" / "run", STEPS), 1)
    assert fleet.wait() == [2]
    assert f"exp_manager.explicit_log_dir={tmp_path / 'file' / 'run'}: cannot write there" in fleet.error_line()


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """The last tenth is gone."""
    os.truncate(path, path.stat().st_size * 9 // 10)


@pytest.fixture(scope="session")
def interrupted(setting: Setting) -> dict[str, Path]:
    """Log folders of runs that were killed once they had two checkpoints."""
    folders = {}
    for kind in ("alone", "rollout_alone"):
        folders[kind] = setting.folder / f"interrupted_{kind}"
        arguments = setting.arguments(kind, folders[kind], STEPS)
        fleet = Fleet.start(setting.folder / f"interrupted_{kind}_output", arguments, ranks_of(kind))
        wait_until(lambda kind=kind: (folders[kind] / SAVED).exists(), fleet)  # type: ignore[misc]
        fleet.kill()
    return folders


KINDS = [("alone", "weights/*.distcp"), ("rollout_alone", "rollout.safetensors")]
MORE_KINDS = [
    ("alone", "manifest.json"),
    ("alone", "state.json"),
    ("alone", "weights/.metadata"),
    ("alone", "weights/metadata.json"),
    ("alone", "weights/common.pt"),
    ("alone", "huggingface/config.json"),
    ("alone", "huggingface/tokenizer.json"),
]
EVERY_KIND = [*KINDS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_KINDS)]


@pytest.mark.parametrize("damage", [flip, pytest.param(truncate, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "name"), EVERY_KIND)
def test_a_damaged_file(setting: Setting, interrupted: dict[str, Path], tmp_path: Path, kind, name, damage) -> None:
    log_dir = tmp_path / "run"
    shutil.copytree(interrupted[kind], log_dir)
    newest = max(path for path in (log_dir / "checkpoints").glob("step_*"))
    damage(spoilt := next(newest.glob(name)))
    arguments = setting.arguments(kind, log_dir, STEPS)
    fleet = Fleet.start(tmp_path / "output", arguments, 1)
    assert fleet.wait() == [2], fleet.errors()
    line = fleet.error_line()
    assert str(spoilt) in line and "damaged" in line and "when_damaged=previous goes on from step_" in line, line
    previous = [*arguments, "exp_manager.checkpoint_callback_params.when_damaged=previous"]
    said = finished(tmp_path / "output", previous, 1).errors()
    assert f"set aside as damaged_{newest.name}" in said
    identical = losses(log_dir) == setting.expected(kind, STEPS)
    record(f"{damage.__doc__.split('.')[0].lower()}: {name}", 1, 1, int(identical))


def test_every_kind_of_file_is_damaged_here(interrupted: dict[str, Path]) -> None:
    patterns: dict[str, list[str]] = {}
    for kind, name in [*KINDS, *MORE_KINDS]:
        patterns.setdefault(kind, []).append(name)
    for kind, folder in interrupted.items():
        checkpoint = folder / SAVED
        known = {
            path for name in (*patterns[kind], *patterns["alone"], "huggingface/*") for path in checkpoint.glob(name)
        }
        assert {path for path in checkpoint.rglob("*") if path.is_file()} == known
