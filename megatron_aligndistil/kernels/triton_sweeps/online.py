"""What the kernels share."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from megatron_aligndistil.kernels.triton_sweeps.launching import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def exp(x):
    """e^x, 0 below the smallest normal number: Triton's own keeps denormals, at three instructions an element."""
    if _INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.fast_expf(x)


@triton.jit
def rise(maximum, logits):
    """A row's maximum after one more block of it: (maximum, anchor, scale, growth).

    anchor  what to subtract from logits: the maximum, 0 as long as that is -inf
    scale   factor of the sums so far, exp(old - new); 0 before the first block
    growth  new - old, by which values relative to the maximum have sunk; 0 before the first block
    """
    risen = tl.maximum(maximum, tl.max(logits, 0))
    anchor = tl.where(risen == float("-inf"), 0.0, risen)
    growth = tl.where(maximum == float("-inf"), 0.0, anchor - maximum)
    return risen, anchor, exp(maximum - anchor), growth


@triton.jit
def block_of(columns, BLOCK: tl.constexpr):
    """(row in 64 bits, offsets of this program's block, which of them the row has), one program a block of a row."""
    blocks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    offset = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), offset, offset < columns
