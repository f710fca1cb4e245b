"""The KL between two models' softmaxes, either way, and its gradient with respect to the policy's logits.

With x = z - m, e = exp(x) of the policy and x', e' of the other:
to the other,   KL(pi || pi') = E[x - x'] - log s + log s',  gradient pi (x - x' - E[x - x']);
from the other, KL(pi' || pi) = -E'[x - x'] - log s' + log s, gradient pi - pi'.

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


def token_kl_sums(logits_CV: Tensor, other_logits_CV: Tensor, from_other: bool) -> Tensor:
    """(m, s, sum of e (x - x'), m', s'), fp32 [5, C]; ``from_other``: sum of e' (x - x'). Reads 8 bytes a column."""
    check_logits(logits_CV, other_logits_CV)
    weighting, compared = (other_logits_CV, logits_CV) if from_other else (logits_CV, other_logits_CV)
    operands = (weighting, weighting.stride(0), compared, compared.stride(0))
    words_KC = empty_words(logits_CV, 5, maxima=(0, 3))
    return run_rows(_token_kl_sums, words_KC, logits_CV.shape[1], *operands, FROM_OTHER=from_other)


def token_kl_gradient(
    logits_CV: Tensor,
    other_logits_CV: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    from_other: bool,
    out_CV: Tensor,
) -> None:
    """Writes the gradient with respect to the policy's logits to ``out_CV``. Reads 8 bytes a column.

    state  [C] each: max, sum, mean, other max, other sum over the whole vocabulary, mean that of x - x' under pi; not
           used are the other sum, and with ``from_other`` the mean
    """
    check_logits(logits_CV, other_logits_CV)
    check_rows(logits_CV, *state)
    check_gradient(logits_CV, out_CV)
    operands = (logits_CV, logits_CV.stride(0), other_logits_CV, other_logits_CV.stride(0), *state)
    run_tiles(_token_kl_gradient, out_CV, *operands, FROM_OTHER=from_other)


@tuned
@triton.jit(do_not_specialize=["rows"])
def _token_kl_sums(
    logits_a,
    logits_a_stride,
    logits_b,
    logits_b_stride,
    words,
    rows,
    columns,
    FROM_OTHER: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # a is the model that weighs: the policy, or the other with FROM_OTHER.
    row = tl.program_id(0).to(tl.int64)
    logits_a += row * logits_a_stride
    logits_b += row * logits_b_stride
    maximum_a = float("-inf")
    maximum_b = float("-inf")
    total_a = tl.zeros([BLOCK], tl.float32)
    total_b = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        offset = start + tl.arange(0, BLOCK)
        held = offset < columns
        z_a = tl.load(logits_a + offset, mask=held, other=float("-inf"))
        z_b = tl.load(logits_b + offset, mask=held, other=float("-inf"))
        maximum_a, anchor_a, scale_a, growth_a = rise(maximum_a, z_a)
        maximum_b, anchor_b, scale_b, growth_b = rise(maximum_b, z_b)
        x_a, x_b = z_a - anchor_a, z_b - anchor_b
        weight_a = exp(x_a)
        weighted = (weighted + (growth_b - growth_a) * total_a) * scale_a + weight_a * tl.where(held, x_a - x_b, 0.0)
        total_a = total_a * scale_a + weight_a
        total_b = total_b * scale_b + exp(x_b)
    of_a = words + row + (3 * rows if FROM_OTHER else 0)
    of_b = words + row + (0 if FROM_OTHER else 3 * rows)
    tl.store(of_a, maximum_a)
    tl.store(of_a + rows, tl.sum(total_a, 0))
    difference = tl.sum(weighted, 0)
    tl.store(words + 2 * rows + row, -difference if FROM_OTHER else difference)
    tl.store(of_b, maximum_b)
    tl.store(of_b + rows, tl.sum(total_b, 0))


@triton.jit
def _token_kl_gradient(
    logits,
    logits_stride,
    other_logits,
    other_logits_stride,
    max_logit,
    sum_exp,
    mean,
    other_max,
    other_sum,
    out,
    out_stride,
    columns,
    FROM_OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, offset, held = block_of(columns, BLOCK)
    x = tl.load(logits + row * logits_stride + offset, mask=held, other=0.0) - tl.load(max_logit + row)
    other_x = tl.load(other_logits + row * other_logits_stride + offset, mask=held, other=0.0)
    other_x -= tl.load(other_max + row)
    pi = exp(x) * (1.0 / tl.load(sum_exp + row))
    if FROM_OTHER:
        gradient = pi - exp(other_x) * (1.0 / tl.load(other_sum + row))
    else:
        gradient = pi * (x - other_x - tl.load(mean + row))
    tl.store(out + row * out_stride + offset, gradient.to(out.dtype.element_ty), mask=held)
