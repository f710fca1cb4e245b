"""What the launchers share: checks of the operands, the tuned configurations, and the two grids.

Shapes: C tokens of a chunk, V columns of a shard or of a tile of it, K words a token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

# (columns a block, warps, blocks in flight by asynchronous copies). Narrow programs, of which many are resident, up to
# a wide one for chunks of few rows; 8 or 16 columns a thread.
_STATISTIC = [(1024, 4, 1), (2048, 4, 1), (2048, 8, 3), (4096, 16, 1)]
STATISTIC_CONFIGS = [
    triton.Config({"BLOCK": block, "STAGES": stages}, num_warps=warps)
    for block, warps, stages in (_STATISTIC[:1] if INTERPRETED else _STATISTIC)
]
# A gradient reduces nothing, so there is little to choose, and it may overwrite its own input, over which tuning would
# run it repeatedly: one configuration.
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
# Below this many rows a program a row leaves SMs idle unless it is wide: tuned apart.
_FEW_ROWS = 512

# The choice is kept on disk: the last bits of the sums depend on it, and a resumed run wants its own again.
tuned = triton.autotune(configs=STATISTIC_CONFIGS, key=["columns", "FEW_ROWS"], cache_results=True)


def check_logits(*logits: Tensor) -> None:
    """fp32 [C, V] of one shape on one device, any row stride."""
    first = logits[0]
    for tensor in logits:
        if tensor.dtype != torch.float32 or tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
            raise ValueError(
                f"logits must be fp32 [C, V] with adjacent columns, got {tensor.dtype} {list(tensor.shape)} of strides "
                f"{tensor.stride()}"
            )
        if tensor.shape != first.shape or tensor.device != first.device:
            raise ValueError(
                f"logits of one chunk must agree: {list(tensor.shape)} on {tensor.device}, {list(first.shape)} on "
                f"{first.device}"
            )


def check_rows(logits_CV: Tensor, *vectors: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """One value a row, contiguous, beside the logits."""
    rows, device = logits_CV.shape[0], logits_CV.device
    for vector_C in vectors:
        right = vector_C.shape == (rows,) and vector_C.dtype == dtype and vector_C.device == device
        if not right or not vector_C.is_contiguous():
            raise ValueError(
                f"want a contiguous {dtype} [{rows}] on {device}, got {vector_C.dtype} {list(vector_C.shape)} on "
                f"{vector_C.device}, strides {vector_C.stride()}"
            )


def check_gradient(logits_CV: Tensor, out_CV: Tensor) -> None:
    """fp32 or bf16, of the logits' shape; one of the logits tensors itself, or apart from all."""
    right = out_CV.shape == logits_CV.shape and out_CV.dtype in (torch.float32, torch.bfloat16)
    if not right or out_CV.device != logits_CV.device or (out_CV.shape[1] > 1 and out_CV.stride(1) != 1):
        raise ValueError(
            f"want fp32 or bf16 {list(logits_CV.shape)} on {logits_CV.device} to write to, got {out_CV.dtype} "
            f"{list(out_CV.shape)} on {out_CV.device}, strides {out_CV.stride()}"
        )


def empty_words(logits_CV: Tensor, words: int, maxima: tuple[int, ...]) -> Tensor:
    """[K, C] to be written by ``run_rows``; what no column gives where there is none: -inf maxima, 0 sums."""
    words_KC = logits_CV.new_empty((words, logits_CV.shape[0]))
    if logits_CV.shape[1] == 0:
        words_KC.zero_()
        for word in maxima:
            words_KC[word] = -torch.inf
    return words_KC


def run_rows(kernel: Any, words_KC: Tensor, columns: int, *operands: Any, **constants: bool) -> Tensor:
    """``words_KC``, written by one program a row."""
    rows = words_KC.shape[1]
    if rows and columns:
        with torch.cuda.device_of(words_KC):
            kernel[(rows,)](
                *operands, words_KC, rows, columns, FEW_ROWS=rows < _FEW_ROWS, enable_fp_fusion=True, **constants
            )
    return words_KC


def run_tiles(kernel: Any, out_CV: Tensor, *operands: Any, **constants: bool) -> None:
    """Writes ``out_CV`` by one program a block of a row."""
    rows, columns = out_CV.shape
    if rows and columns:
        grid = (rows * triton.cdiv(columns, GRADIENT_BLOCK),)
        with torch.cuda.device_of(out_CV):
            kernel[grid](
                *operands,
                out_CV,
                out_CV.stride(0),
                columns,
                BLOCK=GRADIENT_BLOCK,
                num_warps=GRADIENT_WARPS,
                enable_fp_fusion=True,
                **constants,
            )
