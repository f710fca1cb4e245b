"""Compiles the CPU loops once per machine and version, with the C++ compiler that is found."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native_source"
FLAGS = (
    *("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp"),
    # Contractions and quiet maths for the vector loops; no -ffast-math, since infinities have a meaning here.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
BUILD_SECONDS = 300


@cache
def native_operators() -> Any | None:
    """The compiled operators; None, with one log line that says why, where they can't be had."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.info("kernels: PyTorch's operators (no C++ compiler was found for the compiled ones)")
        return None
    try:
        torch.ops.load_library(_built(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        logger.warning("kernels: PyTorch's operators, since the compiled ones failed: %s", detail.strip()[-500:])
        return None
    logger.info("kernels: compiled CPU loops")
    return torch.ops.aligndistil


@cache
def native_takes(dtype: torch.dtype) -> bool:
    """Whether the compiled products work for operands of this type on this processor."""
    operators = native_operators()
    if operators is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    left = torch.ones(2, 2, dtype=dtype)
    right, out = (operators.paired_rows(left) if dtype == torch.bfloat16 else left), torch.zeros(2, 2)
    try:
        operators.product(left, right, out, False)
    except RuntimeError as error:  # oneDNN has no such kernel for the processor
        logger.info("kernels: PyTorch's operators for %s (%s)", dtype, str(error).splitlines()[0])
        return False
    return True


def _built(compiler: str) -> Path:
    sources = sorted(SOURCES.glob("*.cpp"))
    identity = hashlib.sha256()
    for part in (torch.__version__, compiler, *FLAGS, _processor(), *(path.read_text() for path in sources)):
        identity.update(part.encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_aligndistil" / "native"
    library = folder / f"{identity.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first rank compiles, the others wait
        if not library.exists():
            logger.info("kernels: compiling the CPU loops, once")
            _compile(compiler, sources, library)
    return library


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    """The sources side by side, then one library, which appears whole."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, ThreadPoolExecutor() as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def run(*arguments: str) -> None:
            command = [compiler, *FLAGS, *arguments]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)

        def compile_one(source: Path, to: Path) -> None:
            run("-isystem", str(torch_folder / "include"), "-c", str(source), "-o", str(to))

        list(pool.map(compile_one, sources, objects))
        linked = Path(folder) / library.name
        run("-shared", *map(str, objects), "-o", str(linked), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10")
        linked.replace(library)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
