"""The teachers' scalars and the KL to the extrapolation: t = log pi_d + alpha D with D = log pi_d - log pi_r,
log pi* = t - log Z*.

All kernels form t by the same instructions, so that the rounding of log Z_d and log Z_r, times alpha, is the same in
log Z* and in the policy's sweeps and cancels in the KL.

Shapes: C tokens of a chunk, V columns of a shard or of a tile of it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0913, PLR0917
from __future__ import annotations

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

Softmax = tuple[Tensor, Tensor]
RowScalars = tuple[Tensor, Tensor, Tensor]
ChunkLogits = tuple[Tensor, Tensor, Tensor]


def total_variation(logits_d_CV: Tensor, logits_r_CV: Tensor, softmax_d: Softmax, softmax_r: Softmax) -> Tensor:
    """These columns' part of 1/2 sum |pi_d - pi_r|, fp32 [1, C]. Reads 8 bytes a column.

    softmax_d, softmax_r  (max, sum) of the models' whole softmaxes, [C] each. Not log Z, whose rounding is that of a
                          number as large as the logits
    """
    check_logits(logits_d_CV, logits_r_CV)
    check_rows(logits_d_CV, *softmax_d, *softmax_r)
    operands = (logits_d_CV, logits_d_CV.stride(0), logits_r_CV, logits_r_CV.stride(0), *softmax_d, *softmax_r)
    return run_rows(_total_variation, empty_words(logits_d_CV, 1, maxima=()), logits_d_CV.shape[1], *operands)


def target_sums(logits_d_CV: Tensor, logits_r_CV: Tensor, scalars: RowScalars) -> Tensor:
    """(m, s) of t, fp32 [2, C]; ``scalars`` are (log Z_d, log Z_r, alpha), [C] each. Reads 8 bytes a column."""
    check_logits(logits_d_CV, logits_r_CV)
    check_rows(logits_d_CV, *scalars)
    operands = (logits_d_CV, logits_d_CV.stride(0), logits_r_CV, logits_r_CV.stride(0), *scalars)
    return run_rows(_target_sums, empty_words(logits_d_CV, 2, maxima=(0,)), logits_d_CV.shape[1], *operands)


def extrapolated_sums(logits: ChunkLogits, scalars: RowScalars) -> Tensor:
    """(m, s, sum of e w, sum of e D), x = z_p - m, e = exp(x), w = x - t: fp32 [4, C].

    logits   of the policy, the DPO and the reverse DPO model
    scalars  (log Z_d, log Z_r, alpha), [C] each
    Reads 12 bytes a column.
    """
    words_KC = empty_words(logits[0], 4, maxima=(0,))
    return run_rows(_extrapolated_sums, words_KC, logits[0].shape[1], *_operands(logits, scalars))


def extrapolated_gradient(logits: ChunkLogits, scalars: RowScalars, state: RowScalars, out_CV: Tensor) -> None:
    """Writes pi (w - mean) to ``out_CV``, pi = exp(z_p - max) / sum, w = z_p - max - t. Reads 12 bytes a column.

    logits, scalars  as in ``extrapolated_sums``
    state            [C] each: max, sum and the mean of w over the whole vocabulary
    """
    operands = _operands(logits, scalars)
    check_rows(logits[0], *state)
    check_gradient(logits[0], out_CV)
    run_tiles(_extrapolated_gradient, out_CV, *operands, *state)


def _operands(logits: ChunkLogits, scalars: RowScalars) -> tuple[Tensor | int, ...]:
    check_logits(*logits)
    check_rows(logits[0], *scalars)
    return (*(operand for tensor in logits for operand in (tensor, tensor.stride(0))), *scalars)


@triton.jit
def _target(z_d, z_r, lz_d, lz_r, alpha):
    """(t, D). The fused multiply-add is written out, so that no compiler chooses it in one kernel only."""
    logprob_d = z_d - lz_d
    gap = logprob_d - (z_r - lz_r)
    return tl.fma(alpha, gap, logprob_d), gap


@tuned
@triton.jit(do_not_specialize=["rows"])
def _total_variation(
    logits_d,
    logits_d_stride,
    logits_r,
    logits_r_stride,
    max_d,
    sum_d,
    max_r,
    sum_r,
    words,
    rows,
    columns,
    FEW_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_d += row * logits_d_stride
    logits_r += row * logits_r_stride
    top_d, top_r = tl.load(max_d + row), tl.load(max_r + row)
    share_d, share_r = 1.0 / tl.load(sum_d + row), 1.0 / tl.load(sum_r + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        offset = start + tl.arange(0, BLOCK)
        held = offset < columns
        z_d = tl.load(logits_d + offset, mask=held, other=float("-inf"))
        z_r = tl.load(logits_r + offset, mask=held, other=float("-inf"))
        total += tl.abs(exp(z_d - top_d) * share_d - exp(z_r - top_r) * share_r)
    tl.store(words + row, 0.5 * tl.sum(total, 0))


@tuned
@triton.jit(do_not_specialize=["rows"])
def _target_sums(
    logits_d,
    logits_d_stride,
    logits_r,
    logits_r_stride,
    log_z_d,
    log_z_r,
    alpha,
    words,
    rows,
    columns,
    FEW_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_d += row * logits_d_stride
    logits_r += row * logits_r_stride
    lz_d, lz_r, alpha = tl.load(log_z_d + row), tl.load(log_z_r + row), tl.load(alpha + row)
    maximum = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        offset = start + tl.arange(0, BLOCK)
        held = offset < columns
        z_d = tl.load(logits_d + offset, mask=held, other=0.0)
        z_r = tl.load(logits_r + offset, mask=held, other=0.0)
        target, _ = _target(z_d, z_r, lz_d, lz_r, alpha)
        target = tl.where(held, target, float("-inf"))
        maximum, anchor, scale, _ = rise(maximum, target)
        total = total * scale + exp(target - anchor)
    tl.store(words + row, maximum)
    tl.store(words + rows + row, tl.sum(total, 0))


@tuned
@triton.jit(do_not_specialize=["rows"])
def _extrapolated_sums(
    logits_p,
    logits_p_stride,
    logits_d,
    logits_d_stride,
    logits_r,
    logits_r_stride,
    log_z_d,
    log_z_r,
    alpha,
    words,
    rows,
    columns,
    FEW_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_p += row * logits_p_stride
    logits_d += row * logits_d_stride
    logits_r += row * logits_r_stride
    lz_d, lz_r, alpha = tl.load(log_z_d + row), tl.load(log_z_r + row), tl.load(alpha + row)
    maximum = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    weighted_gap = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        offset = start + tl.arange(0, BLOCK)
        held = offset < columns
        z_p = tl.load(logits_p + offset, mask=held, other=float("-inf"))
        z_d = tl.load(logits_d + offset, mask=held, other=0.0)
        z_r = tl.load(logits_r + offset, mask=held, other=0.0)
        target, gap = _target(z_d, z_r, lz_d, lz_r, alpha)
        maximum, anchor, scale, growth = rise(maximum, z_p)
        x = z_p - anchor
        weight = exp(x)
        weighted = (weighted - growth * total) * scale + weight * tl.where(held, x - target, 0.0)
        weighted_gap = weighted_gap * scale + weight * gap
        total = total * scale + weight
    tl.store(words + row, maximum)
    tl.store(words + rows + row, tl.sum(total, 0))
    tl.store(words + 2 * rows + row, tl.sum(weighted, 0))
    tl.store(words + 3 * rows + row, tl.sum(weighted_gap, 0))


@triton.jit
def _extrapolated_gradient(
    logits_p,
    logits_p_stride,
    logits_d,
    logits_d_stride,
    logits_r,
    logits_r_stride,
    log_z_d,
    log_z_r,
    alpha,
    max_logit,
    sum_exp,
    mean,
    out,
    out_stride,
    columns,
    BLOCK: tl.constexpr,
):
    row, offset, held = block_of(columns, BLOCK)
    z_p = tl.load(logits_p + row * logits_p_stride + offset, mask=held, other=0.0)
    z_d = tl.load(logits_d + row * logits_d_stride + offset, mask=held, other=0.0)
    z_r = tl.load(logits_r + row * logits_r_stride + offset, mask=held, other=0.0)
    target, _ = _target(z_d, z_r, tl.load(log_z_d + row), tl.load(log_z_r + row), tl.load(alpha + row))
    x = z_p - tl.load(max_logit + row)
    pi = exp(x) * (1.0 / tl.load(sum_exp + row))
    gradient = pi * (x - target - tl.load(mean + row))
    tl.store(out + row * out_stride + offset, gradient.to(out.dtype.element_ty), mask=held)
