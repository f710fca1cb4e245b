"""The tiny quickstart on Python 3.12 with the newest Megatron-Core, in an environment of its own.

ALIGNDISTIL_PY312_VENV names a virtual environment to use; without it one is built, which downloads gigabytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_aligndistil.launch.quickstart_recipe import Folders

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "requirements" / "constraints-py312-cpu.txt"
GIVEN = "ALIGNDISTIL_PY312_VENV"
NEEDED_GIB = 16  # torch's CUDA packages, as downloads and installed
LIMIT_SECONDS = 900

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def interpreters() -> list[Path]:
    """Where a Python 3.12 may be: on the PATH, and under pyenv whether or not that selects it."""
    folders = [Path(entry) for entry in os.get_exec_path() if entry]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    folders += [version / "bin" for version in sorted(versions.glob("3.12*"), reverse=True)]
    return [folder / "python3.12" for folder in folders if (folder / "python3.12").is_file()]


def works(python: Path) -> bool:
    """Whether it runs and can build an environment; a version manager's shim may do neither."""
    script = "import ensurepip, venv, sys; sys.exit(sys.version_info[:2] != (3, 12))"
    try:
        return subprocess.run([python, "-c", script], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def build(python: Path, folder: Path) -> Path:
    """Install the package, from a copy of its sources, by the constraints; returns the environment's interpreter."""
    free = shutil.disk_usage(folder).free / 2**30
    if free < NEEDED_GIB:
        pytest.skip(f"an environment for Python 3.12 takes {NEEDED_GIB} GiB and {free:.0f} are free in {folder}")
    source = folder / "source"
    shutil.copytree(ROOT / "megatron_aligndistil", source / "megatron_aligndistil")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    run([python, "-m", "venv", folder / "venv"], folder)
    built = folder / "venv" / "bin" / "python"
    run([built, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-c", CONSTRAINTS, source], folder, 3000)
    return built


def run(command: list[str | Path], folder: Path, seconds: float = LIMIT_SECONDS) -> str:
    """Run in ``folder``, where the checkout isn't importable unless PYTHONPATH says so; returns what was printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def python312(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has what the package needs."""
    given = os.environ.get(GIVEN)
    if given:
        return Path(given) / "bin" / "python"
    found = interpreters()
    working = next(filter(works, found), None)
    if working is None:
        tried = ", ".join(map(str, found)) or "none is on the PATH or under pyenv"
        pytest.skip(f"no Python 3.12 that runs was found ({tried}); give an environment in {GIVEN}")
    return build(working, tmp_path_factory.mktemp("python312"))


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A given environment has the requirements only and runs the checkout; a built one runs what was installed."""
    if os.environ.get(GIVEN):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
    else:
        monkeypatch.delenv("PYTHONPATH", raising=False)


def test_the_environment_has_the_versions_of_the_constraints(python312: Path, tmp_path: Path) -> None:
    lines = [line.partition("==") for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    names = ("megatron-core", "torch", "transformers", "datasets", "safetensors")
    expected = {name: version for name, _, version in lines if name in names}
    script = "import json, sys; from importlib.metadata import version as v; "
    script += f"print(json.dumps([list(sys.version_info[:2]), {{n: v(n) for n in {names}}}]))"
    python_version, installed = json.loads(run([python312, "-c", script], tmp_path))
    assert python_version == [3, 12]
    assert {name: version.partition("+")[0] for name, version in installed.items()} == expected


def test_the_tiny_quickstart_runs(python312: Path, tmp_path: Path) -> None:
    folders = Folders(tmp_path / "out")
    command: list[str | Path] = [
        python312,
        "-m",
        "megatron_aligndistil",
        "quickstart",
        "--tiny",
        "--output",
        folders.root,
    ]
    run(command, tmp_path)
    summary = json.loads((folders.root / "summary.json").read_text())
    initial, dpo, aligndistil = summary["rows"]
    assert [initial["model"], dpo["model"], aligndistil["model"]] == ["initial", "dpo", "aligndistil"]
    assert initial["kl_to_initial"] == 0.0
    for aligned in (dpo, aligndistil):
        assert math.isfinite(aligned["kl_to_initial"]) and aligned["kl_to_initial"] > 0.0
        assert aligned["heldout_reward"] > initial["heldout_reward"]
