"""What the kernels come to on a GPU, read from ptxas without having one.

``python -m megatron_aligndistil.kernels.triton_sweeps.compiled`` prints the table.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from megatron_aligndistil.errors import UserError
from megatron_aligndistil.kernels.triton_sweeps import extrapolation, softmax, token_kl
from megatron_aligndistil.kernels.triton_sweeps.launching import (
    GRADIENT_BLOCK,
    GRADIENT_WARPS,
    INTERPRETED,
    STATISTIC_CONFIGS,
)

_ARCHITECTURES = (80, 90, 100)
_LOGIT_BYTES = 4
_OUT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Sweep:
    """A kernel with its compile-time choices.

    logits_read  tensors [C, V] that it reads
    out          type of the [C, V] that it writes, None for a statistic
    """

    kernel: Any
    name: str
    logits_read: int
    out: str | None
    constants: tuple[tuple[str, bool], ...] = ()

    @property
    def least_bytes(self) -> int:
        """Bytes a column that no implementation over fp32 logits in memory can do without."""
        return _LOGIT_BYTES * self.logits_read + (_OUT_BYTES[self.out] if self.out else 0)


@dataclass(frozen=True)
class KernelResources:
    """One compiled kernel.

    architecture  90 for sm_90
    block, warps  columns and warps a program handles at a time
    stages        blocks in flight by asynchronous copies; 1: plain loads
    registers     a thread's
    shared_bytes  a program's
    spill_bytes   stores and loads of spilled registers, a thread's
    vector_bytes  the widest load from memory, a thread's
    nearest_bf16  it rounds to bf16, to the nearest
    least_bytes   memory traffic a column that no implementation can do without; the kernels have no other
    """

    name: str
    architecture: int
    block: int
    warps: int
    stages: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    vector_bytes: int
    nearest_bf16: bool
    least_bytes: int


def sweeps() -> Iterator[Sweep]:
    """Every kernel in every variant that a launcher can ask for."""
    yield Sweep(softmax._sums, "softmax_sums", 1, None, (("LABEL", False), ("ENTROPY", False)))
    for entropy in (False, True):
        constants = (("LABEL", True), ("ENTROPY", entropy))
        yield Sweep(softmax._sums, f"label_sums{' entropy' * entropy}", 1, None, constants)
    for out in _OUT_BYTES:
        yield Sweep(softmax._label_gradient, f"label_gradient {out}", 1, out)
    for from_other in (False, True):
        suffix, direction = " from_other" * from_other, (("FROM_OTHER", from_other),)
        yield Sweep(token_kl._token_kl_sums, f"token_kl_sums{suffix}", 2, None, direction)
        for out in _OUT_BYTES:
            yield Sweep(token_kl._token_kl_gradient, f"token_kl_gradient{suffix} {out}", 2, out, direction)
    yield Sweep(extrapolation._total_variation, "total_variation", 2, None)
    yield Sweep(extrapolation._target_sums, "target_sums", 2, None)
    yield Sweep(extrapolation._extrapolated_sums, "extrapolated_sums", 3, None)
    for out in _OUT_BYTES:
        yield Sweep(extrapolation._extrapolated_gradient, f"extrapolated_gradient {out}", 3, out)


def configurations(sweep: Sweep) -> list[triton.Config]:
    """What a launcher may run the sweep with."""
    if sweep.out is None:
        return STATISTIC_CONFIGS
    return [triton.Config({"BLOCK": GRADIENT_BLOCK}, num_warps=GRADIENT_WARPS)]


def resources(architecture: int, aligned: bool = True) -> list[KernelResources]:
    """Registers, shared memory and spills of every kernel in every configuration, compiled for sm_<architecture>.

    aligned  rows at multiples of 16 elements, which is what lets a thread load 16 bytes at a time
    Takes some 10 s the first time; Triton keeps what it compiled.
    """
    return [
        measure(sweep, configuration, architecture, aligned)
        for sweep in sweeps()
        for configuration in configurations(sweep)
    ]


def measure(sweep: Sweep, configuration: triton.Config, architecture: int, aligned: bool = True) -> KernelResources:
    """One kernel in one configuration, compiled for sm_<architecture>; see ``resources``."""
    if architecture < _ARCHITECTURES[0]:
        raise UserError(
            f"architecture {architecture}: bf16 needs sm_80 or later; give 80, 90, 100 or another from there"
        )
    if INTERPRETED:
        raise UserError("Triton's environment: TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    options = {"num_warps": configuration.num_warps, "enable_fp_fusion": True}
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(_source(sweep, configuration, aligned), target=target, options=options)
    ptx = compiled.asm["ptx"]
    report = _ptxas_report(ptx, architecture)
    return KernelResources(
        name=sweep.name,
        architecture=architecture,
        block=configuration.kwargs["BLOCK"],
        warps=configuration.num_warps,
        stages=configuration.kwargs.get("STAGES", 1),
        registers=_sum(r"Used (\d+) registers", report),
        shared_bytes=compiled.metadata.shared,
        spill_bytes=_sum(r"(\d+) bytes spill (?:stores|loads)", report),
        vector_bytes=_widest_load(ptx),
        nearest_bf16="cvt.rn.bf16" in ptx,
        least_bytes=sweep.least_bytes,
    )


def _source(sweep: Sweep, configuration: triton.Config, aligned: bool) -> ASTSource:
    function = getattr(sweep.kernel, "fn", sweep.kernel) if sweep.out is None else sweep.kernel
    constants = {**dict(sweep.constants), **configuration.kwargs}
    if sweep.out is None:
        constants["FEW_ROWS"] = False
    types = {name: "constexpr" if name.isupper() else _type(name, sweep) for name in function.arg_names}
    # What a launch finds out about its operands: all but ``rows`` are multiples of 16 (bytes, for pointers).
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(types.items())
        if aligned and kind != "constexpr" and name != "rows"
    }
    return ASTSource(function, types, constexprs=constants, attrs=attributes)


def _type(name: str, sweep: Sweep) -> str:
    if name in ("rows", "columns") or name.endswith("_stride"):
        return "i32"
    return {"column": "*i64", "out": f"*{sweep.out}"}.get(name, "*fp32")


def _ptxas_report(ptx: str, architecture: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        # Triton 3.5 has one ptxas for all architectures.
        ptxas = get_ptxas(architecture) if signature(get_ptxas).parameters else get_ptxas()
        target = f"--gpu-name={sm_arch_from_capability(architecture)}"
        command = [ptxas.path, "-v", target, str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _sum(pattern: str, report: str) -> int:
    found = re.findall(pattern, report)
    if not found:
        raise RuntimeError(f"ptxas -v said nothing like {pattern!r}: {report}")
    return sum(map(int, found))


def _widest_load(ptx: str) -> int:
    """Of logits: a lone 8-byte load is a label's."""
    loads = re.findall(r"ld\.global(?:\.[a-z_0-9:]+)*?(?:\.v(\d)\.[bf](\d+)|\.[bf]32)\s", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global(?:\.\w+)* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    return max([int(count or 1) * int(bits or 32) // 8 for count, bits in loads] + [int(size, 0) for size in copies])


def table(rows: list[KernelResources]) -> str:
    """The resources as text, a line each."""
    head = f"{'sweep':32}{'sm':>5}{'block':>7}{'warps':>7}{'stages':>8}{'registers':>11}"
    lines = [f"{head}{'shared B':>10}{'spills B':>10}{'load B':>8}{'least B/column':>16}"]
    for row in rows:
        shape = f"{row.name:32}{row.architecture:5}{row.block:7}{row.warps:7}{row.stages:8}"
        cost = f"{row.registers:11}{row.shared_bytes:10}{row.spill_bytes:10}{row.vector_bytes:8}{row.least_bytes:16}"
        lines.append(shape + cost)
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([row for architecture in _ARCHITECTURES for row in resources(architecture)]))
