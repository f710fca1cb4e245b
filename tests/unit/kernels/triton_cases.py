"""Problems for the Triton launchers, their float64 answers from the formulas, and a program that runs all of them.

``python -m tests.unit.kernels.triton_cases`` under TRITON_INTERPRET=1 prints what it found as JSON: a process of its
own, since Triton reads that variable once. The tests on a GPU use the same problems.

Shapes: C tokens of a chunk, V columns, K words a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder as builder

from megatron_aligndistil.kernels.triton_sweeps import extrapolation, softmax, token_kl

SHAPES = [(1, 1), (3, 5), (5, 127), (7, 1000), (4, 2049)]
KINDS = ["moderate", "shifted", "steep"]
NOTHING = 1e-20  # beside a sum of exponentials, which is at least 1; below it they underflow
Answers = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """Logits of the policy, the DPO and the reverse DPO model: [C, V] with row strides of their own."""

    p_CV: Tensor
    d_CV: Tensor
    r_CV: Tensor
    column_C: Tensor
    alpha_C: Tensor

    @property
    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.p_CV, self.d_CV, self.r_CV


def problem(rows: int, columns: int, kind: str, device: str = "cpu", padding: int = 1) -> Problem:
    """moderate: logits of about 10; shifted: those, and 1000 up or down a row; steep: logits of about 1000."""
    generator = torch.Generator().manual_seed(rows * 10_000 + columns)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    base_CV = normal(rows, columns)
    logits = []
    for model in range(3):
        z_CV = (3 * base_CV + normal(rows, columns)) * (300.0 if kind == "steep" else 1.0)
        if kind == "shifted":
            z_CV += 1000.0 * normal(rows, 1).sign()
        storage = torch.full((rows, columns + padding * model), torch.nan, device=device)
        storage[:, :columns] = z_CV
        logits.append(storage[:, :columns])
    column_C = torch.randint(columns, (rows,), generator=generator)
    column_C[rows // 2] = -1
    column_C[-1] = columns - 1
    alpha_C = torch.full((rows,), 1.7 if kind == "moderate" else 40.0)
    return Problem(logits[0], logits[1], logits[2], column_C.to(device), alpha_C.to(device))


def row_scalars(case: Problem) -> dict[str, Tensor]:
    """fp32 inputs that other sweeps produce, [C] each."""
    p, d, r = (z.double() for z in case.logits)
    log_z_d, log_z_r = d.logsumexp(-1), r.logsumexp(-1)
    gap = (d - log_z_d[:, None]) - (r - log_z_r[:, None])
    x, other_x = p - p.amax(-1, keepdim=True), d - d.amax(-1, keepdim=True)
    w = x - (d - log_z_d[:, None] + case.alpha_C.double()[:, None] * gap)
    made = {
        "log_z_d": log_z_d,
        "log_z_r": log_z_r,
        "max": p.amax(-1),
        "sum": x.exp().sum(-1),
        "mean": (p.softmax(-1) * w).sum(-1),
        "kl_mean": (p.softmax(-1) * (x - other_x)).sum(-1),
        "other_max": d.amax(-1),
        "other_sum": other_x.exp().sum(-1),
        "third_max": r.amax(-1),
        "third_sum": (r - r.amax(-1, keepdim=True)).exp().sum(-1),
    }
    return {name: values.float() for name, values in made.items()}


def formulas(case: Problem, dtype: torch.dtype) -> Answers:
    """Every launcher's result, and the size of the terms it is a sum of: [K, C] for statistics, [C, V] for gradients.

    In float64 the reference, in float32 what plain PyTorch makes of the formulas.
    """
    p, d, r = (z.to(dtype) for z in case.logits)
    scalar = {name: values.to(dtype)[:, None] for name, values in row_scalars(case).items()}
    alpha, column = case.alpha_C.to(dtype)[:, None], case.column_C[:, None]
    onehot = (torch.arange(p.shape[1], device=p.device) == column).to(dtype)
    log_d, log_r = d - scalar["log_z_d"], r - scalar["log_z_r"]
    gap = log_d - log_r
    t = log_d + alpha * gap
    max_p, max_d, max_t = (z.amax(-1, keepdim=True) for z in (p, d, t))
    x, other_x = p - max_p, d - max_d
    e, other_e = x.exp(), other_x.exp()
    pi = (p - scalar["max"]).exp() / scalar["sum"]
    other_pi = (d - scalar["other_max"]).exp() / scalar["other_sum"]
    third_pi = (r - scalar["third_max"]).exp() / scalar["third_sum"]
    global_x = p - scalar["max"]
    w, kl_gap = global_x - t, global_x - (d - scalar["other_max"])
    return {
        "softmax_sums": _sums(max_p, e),
        "label_sums": _sums(max_p, e, p * onehot),
        "label_sums entropy": _sums(max_p, e, p * onehot, e * x),
        "total_variation": (_sums((other_pi - third_pi).abs() / 2)[0], _sums(other_pi + third_pi)[1]),
        "target_sums": _sums(max_t, (t - max_t).exp()),
        "extrapolated_sums": _sums(max_p, e, e * (x - t), e * gap),
        "token_kl_sums": _sums(max_p, e, e * (x - other_x), max_d, other_e),
        "token_kl_sums from_other": _sums(max_p, e, other_e * (x - other_x), max_d, other_e),
        "label_gradient": (onehot - pi, onehot + pi),
        "extrapolated_gradient": (pi * (w - scalar["mean"]), pi * (w.abs() + scalar["mean"].abs())),
        "token_kl_gradient": (pi * (kl_gap - scalar["kl_mean"]), pi * (kl_gap.abs() + scalar["kl_mean"].abs())),
        "token_kl_gradient from_other": (pi - other_pi, pi + other_pi),
    }


def _sums(*terms: Tensor) -> tuple[Tensor, Tensor]:
    """([K, C] sums over the columns, [K, C] sums of absolute values); a [C, 1] is a word already."""
    return torch.stack([term.sum(-1) for term in terms]), torch.stack([term.abs().sum(-1) for term in terms])


def _scalars(case: Problem) -> tuple[Tensor, Tensor, Tensor]:
    made = row_scalars(case)
    return made["log_z_d"], made["log_z_r"], case.alpha_C


def _softmaxes(case: Problem) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    made = row_scalars(case)
    return (made["other_max"], made["other_sum"]), (made["third_max"], made["third_sum"])


STATISTICS: dict[str, Callable[[Problem], Tensor]] = {
    "softmax_sums": lambda case: softmax.softmax_sums(case.p_CV),
    "label_sums": lambda case: softmax.label_sums(case.p_CV, case.column_C, entropy=False),
    "label_sums entropy": lambda case: softmax.label_sums(case.p_CV, case.column_C, entropy=True),
    "total_variation": lambda case: extrapolation.total_variation(case.d_CV, case.r_CV, *_softmaxes(case)),
    "target_sums": lambda case: extrapolation.target_sums(case.d_CV, case.r_CV, _scalars(case)),
    "extrapolated_sums": lambda case: extrapolation.extrapolated_sums(case.logits, _scalars(case)),
    "token_kl_sums": lambda case: token_kl.token_kl_sums(case.p_CV, case.d_CV, from_other=False),
    "token_kl_sums from_other": lambda case: token_kl.token_kl_sums(case.p_CV, case.d_CV, from_other=True),
}


def write_gradient(name: str, case: Problem, out_CV: Tensor) -> None:
    """The gradient's launcher of that name, on ``out_CV``."""
    made = row_scalars(case)
    if name == "label_gradient":
        softmax.label_gradient(case.p_CV, case.column_C, made["max"], made["sum"], out_CV)
    elif name == "extrapolated_gradient":
        state = (made["max"], made["sum"], made["mean"])
        extrapolation.extrapolated_gradient(case.logits, _scalars(case), state, out_CV)
    else:
        pair = (made["max"], made["sum"], made["kl_mean"], made["other_max"], made["other_sum"])
        token_kl.token_kl_gradient(case.p_CV, case.d_CV, pair, name.endswith("from_other"), out_CV)


GRADIENTS = {  # how many of the logits tensors each reads
    "label_gradient": 1,
    "extrapolated_gradient": 3,
    "token_kl_gradient": 2,
    "token_kl_gradient from_other": 2,
}


def gradients(case: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every gradient's launcher, into a tensor with a row stride of its own whose padding must stay as it is."""
    made = {}
    for name in GRADIENTS:
        storage = torch.full((case.p_CV.shape[0], case.p_CV.shape[1] + 5), torch.nan, device=case.p_CV.device)
        storage = storage.to(dtype)
        made[name] = storage[:, :-5]
        write_gradient(name, case, made[name])
        assert bool(storage[:, -5:].isnan().all()), f"{name} wrote beside its columns"
    return made


def in_place(case: Problem) -> Iterator[tuple[str, int, Tensor]]:
    """(name, which logits were overwritten, the result) for every logits tensor that a gradient reads."""
    for name, read in GRADIENTS.items():
        for which in range(read):
            logits = [z.clone() for z in case.logits]
            write_gradient(name, Problem(*logits, case.column_C, case.alpha_C), logits[which])
            yield name, which, logits[which]


def word_errors(actual_KC: Tensor, answer: tuple[Tensor, Tensor]) -> list[float]:
    """Of each word, the worst row's |difference| / sum of its terms' sizes."""
    value_KC, size_KC = answer
    assert actual_KC.shape == value_KC.shape
    difference_KC = (actual_KC.double() - value_KC).abs()
    return (difference_KC / size_KC.double().clamp_min(NOTHING)).amax(-1).tolist()


def gradient_error(actual_CV: Tensor, answer: tuple[Tensor, Tensor]) -> list[float]:
    """The worst row's ||difference|| / ||terms' sizes||, as the only word."""
    value_CV, size_CV = answer
    difference_C = (actual_CV.double() - value_CV).norm(dim=-1)
    return [float((difference_C / size_CV.double().norm(dim=-1).clamp_min(NOTHING)).max())]


def bf16_error(actual_CV: Tensor, full_CV: Tensor) -> float:
    """The worst element's relative difference from the fp32 gradient, those near underflow left out."""
    difference_CV = (actual_CV.double() - full_CV.double()).abs()
    return float((difference_CV / full_CV.double().abs().clamp_min(NOTHING)).max())


def compare(case: Problem) -> Iterator[dict[str, Any]]:
    """Every launcher's errors against float64, and those of plain fp32 PyTorch."""
    expected, naive = formulas(case, torch.float64), formulas(case, torch.float32)
    for name, launch in STATISTICS.items():
        errors = word_errors(launch(case), expected[name])
        yield {"name": name, "errors": errors, "naive": word_errors(naive[name][0], expected[name])}
    for name, gradient_CV in gradients(case, torch.float32).items():
        errors = gradient_error(gradient_CV, expected[name])
        yield {"name": name, "errors": errors, "naive": gradient_error(naive[name][0], expected[name])}


def traffic(case: Problem) -> dict[str, float]:
    """Bytes a column that each launcher's blocks read and write, counted by the interpreter."""
    moved = [0]
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(pointers, mask, *rest):
        result = load(pointers, mask, *rest)
        moved[0] += int(mask.data.sum()) * result.data.itemsize if result.data.ndim else 0
        return result

    def counted_store(pointers, value, mask, *rest):
        moved[0] += int(mask.data.sum()) * value.data.itemsize if value.data.ndim else 0
        return store(pointers, value, mask, *rest)

    def during(sweep: Callable[[], object]) -> float:
        moved[0] = 0
        sweep()
        return moved[0] / case.p_CV.numel()

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        counted = {name: during(partial(launch, case)) for name, launch in STATISTICS.items()}
        for out, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
            out_CV = torch.empty_like(case.p_CV, dtype=dtype)
            for name in GRADIENTS:
                counted[f"{name} {out}"] = during(partial(write_gradient, name, case, out_CV))
        return counted
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def edges() -> dict[str, Any]:
    """No column, no row, and a first block without a finite logit."""
    no_column, no_row = problem(3, 1, "moderate"), problem(3, 7, "moderate")
    narrow = Problem(*(z[:, :0] for z in no_column.logits), no_column.column_C * 0 - 1, no_column.alpha_C)
    empty = Problem(*(z[:0] for z in no_row.logits), no_row.column_C[:0], no_row.alpha_C[:0])
    scalars = _scalars(no_column)
    words = {
        "softmax_sums": softmax.softmax_sums(narrow.p_CV),
        "label_sums entropy": softmax.label_sums(narrow.p_CV, narrow.column_C, entropy=True),
        "total_variation": extrapolation.total_variation(narrow.d_CV, narrow.r_CV, scalars[:2], scalars[:2]),
        "target_sums": extrapolation.target_sums(narrow.d_CV, narrow.r_CV, scalars),
        "extrapolated_sums": extrapolation.extrapolated_sums(narrow.logits, scalars),
        "token_kl_sums": token_kl.token_kl_sums(narrow.p_CV, narrow.d_CV, from_other=False),
    }
    masked_CV = problem(2, 2049, "moderate").p_CV.clone()
    masked_CV[:, :1024] = -torch.inf
    expected = torch.stack((masked_CV.amax(-1), (masked_CV - masked_CV.amax(-1, keepdim=True)).exp().sum(-1)))
    return {
        "no column": {name: [[str(x) for x in word] for word in w.tolist()] for name, w in words.items()},
        "no row": [list(launch(empty).shape) for launch in (STATISTICS["softmax_sums"], STATISTICS["target_sums"])],
        "masked": float((softmax.softmax_sums(masked_CV) / expected - 1).abs().max()),
    }


def refusals() -> dict[str, str]:
    """What is wrong with some operands, and what was said."""
    case = problem(3, 7, "moderate")
    z_CV, column_C, row_C = case.p_CV, case.column_C, case.alpha_C
    wrong: dict[str, Callable[[], object]] = {
        "torch.float64": lambda: softmax.softmax_sums(z_CV.double()),
        "strides (1, 3)": lambda: softmax.softmax_sums(z_CV.t().contiguous().t()),
        "[3, 6]": lambda: token_kl.token_kl_sums(z_CV, z_CV[:, :6], from_other=False),
        "torch.int32": lambda: softmax.label_sums(z_CV, column_C.int(), entropy=False),
        "[2]": lambda: extrapolation.total_variation(z_CV, z_CV, (row_C, row_C), (row_C, row_C[:2])),
        "torch.float16": lambda: softmax.label_gradient(z_CV, column_C, row_C, row_C, z_CV.half()),
        "[7, 3]": lambda: softmax.label_gradient(z_CV, column_C, row_C, row_C, torch.empty(7, 3)),
    }
    said = {}
    for what, call in wrong.items():
        try:
            call()
            said[what] = "accepted"
        except ValueError as error:
            said[what] = str(error)
    return said


def main() -> None:
    report: dict[str, Any] = {"errors": [], "bf16": [], "in place differs": []}
    for kind in KINDS:
        for rows, columns in SHAPES:
            case = problem(rows, columns, kind)
            where = {"kind": kind, "shape": f"{rows}x{columns}"}
            report["errors"] += [{**where, **row} for row in compare(case)]
            full, half = gradients(case, torch.float32), gradients(case, torch.bfloat16)
            report["bf16"] += [{**where, "name": name, "error": bf16_error(half[name], full[name])} for name in full]
            report["in place differs"] += [
                f"{name} over logits {which} {where}"
                for name, which, result_CV in in_place(case)
                if not torch.equal(result_CV, full[name])
            ]
    report["traffic"] = traffic(problem(2, 3001, "moderate"))
    print(json.dumps({**report, **edges(), "refused": refusals()}))


if __name__ == "__main__":
    main()
