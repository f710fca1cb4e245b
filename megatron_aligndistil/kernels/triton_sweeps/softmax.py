"""Softmax sums, and a label's log-probability with its gradient.

Shapes: C tokens of a chunk, V columns of a shard or of a tile of it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0913, PLR0917
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_aligndistil.kernels.triton_sweeps.launching import (
    check_gradient,
    check_logits,
    check_rows,
    empty_words,
    run_rows,
    run_tiles,
    tuned,
)
from megatron_aligndistil.kernels.triton_sweeps.online import block_of, exp, rise


def softmax_sums(logits_CV: Tensor) -> Tensor:
    """(m, s), s = sum of exp(z - m): fp32 [2, C]. Reads 4 bytes a logit."""
    check_logits(logits_CV)
    words_KC = empty_words(logits_CV, 2, maxima=(0,))
    operands = (logits_CV, logits_CV.stride(0), logits_CV)
    return run_rows(_sums, words_KC, logits_CV.shape[1], *operands, LABEL=False, ENTROPY=False)


def label_sums(logits_CV: Tensor, column_C: Tensor, entropy: bool) -> Tensor:
    """(m, s, the label's logit, with ``entropy`` also sum of e x), x = z - m, e = exp(x): fp32 [3 or 4, C].

    column_C  int64: where these columns hold the label, -1 where they don't (then its logit is 0)
    Reads 4 bytes a logit.
    """
    check_logits(logits_CV)
    check_rows(logits_CV, column_C, dtype=torch.int64)
    words_KC = empty_words(logits_CV, 3 + entropy, maxima=(0,))
    operands = (logits_CV, logits_CV.stride(0), column_C)
    return run_rows(_sums, words_KC, logits_CV.shape[1], *operands, LABEL=True, ENTROPY=entropy)


def label_gradient(logits_CV: Tensor, column_C: Tensor, max_C: Tensor, sum_C: Tensor, out_CV: Tensor) -> None:
    """Writes onehot(label) - pi to ``out_CV``, pi = exp(z - max) / sum, columns as in ``label_sums``. Reads 4 bytes a
    logit."""
    check_logits(logits_CV)
    check_rows(logits_CV, column_C, dtype=torch.int64)
    check_rows(logits_CV, max_C, sum_C)
    check_gradient(logits_CV, out_CV)
    run_tiles(_label_gradient, out_CV, logits_CV, logits_CV.stride(0), column_C, max_C, sum_C)


@tuned
@triton.jit(do_not_specialize=["rows"])
def _sums(
    logits,
    logits_stride,
    column,  # anything without LABEL
    words,
    rows,
    columns,
    LABEL: tl.constexpr,
    ENTROPY: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    maximum = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        offset = start + tl.arange(0, BLOCK)
        held = offset < columns
        z = tl.load(logits + offset, mask=held, other=float("-inf"))
        maximum, anchor, scale, growth = rise(maximum, z)
        x = z - anchor
        weight = exp(x)
        if ENTROPY:
            weighted = (weighted - growth * total) * scale + weight * tl.where(held, x, 0.0)
        total = total * scale + weight
    words += row
    tl.store(words, maximum)
    tl.store(words + rows, tl.sum(total, 0))
    if LABEL:
        words += rows
        label = tl.load(column + row)
        tl.store(words + rows, tl.load(logits + label, mask=label >= 0, other=0.0))
    if ENTROPY:
        tl.store(words + 2 * rows, tl.sum(weighted, 0))


@triton.jit
def _label_gradient(
    logits,
    logits_stride,
    column,
    max_logit,
    sum_exp,
    out,
    out_stride,
    columns,
    BLOCK: tl.constexpr,
):
    row, offset, held = block_of(columns, BLOCK)
    z = tl.load(logits + row * logits_stride + offset, mask=held, other=0.0)
    gradient = exp(z - tl.load(max_logit + row)) * (-1.0 / tl.load(sum_exp + row))
    # Before the rounding to the type of ``out``: 1 - pi is small where the label is likely.
    gradient = tl.where(offset == tl.load(column + row), 1.0 + gradient, gradient)
    tl.store(out + row * out_stride + offset, gradient.to(out.dtype.element_ty), mask=held)
