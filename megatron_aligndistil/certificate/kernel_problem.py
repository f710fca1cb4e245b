"""Measuring one kernel on one random problem: what it computes, sends and holds, against whole logits in float64.

Shapes: T tokens, H hidden size, V vocabulary including padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_aligndistil.certificate.findings import Bounds, Measurement, worst
from megatron_aligndistil.certificate.kernels import THREE, KernelCheck, Model, Side, Values
from megatron_aligndistil.certificate.recorder import Recorder, recorded
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.parallel import groups
from megatron_aligndistil.types import VocabHead

ERROR_BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
BF16_MARGIN = 1e-6  # beyond the error of the dense bf16 formulation
HIDDEN = 24


@dataclass(frozen=True)
class KernelProblem:
    """Models that differ as a policy and its teachers do, over ``vocab`` true of ``padded`` entries.

    The padding's weights are NaN: whoever reads one shows it.
    """

    tokens: int
    vocab: int
    padded: int
    dtype: torch.dtype
    sequence_parallel: bool
    temperature: float = 1.0

    @cached_property
    def models(self) -> dict[Model, tuple[Tensor, Tensor]]:
        """Hidden states [T, H] and whole head [V, H] of each model, on this rank's device."""
        generator = torch.Generator().manual_seed(self.vocab)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)

        base_TH, base_VH = normal(self.tokens), normal(self.padded)
        made: dict[Model, tuple[Tensor, Tensor]] = {}
        for name in THREE:
            weight_VH = 0.5 * base_VH + 0.15 * normal(self.padded)
            weight_VH[self.vocab :] = torch.nan
            hidden_TH = base_TH + 0.3 * normal(self.tokens)
            made[name] = self._placed(hidden_TH), self._placed(weight_VH)
        made["sharing"] = made["reference"][0], made["dpo"][1]
        return made

    def _placed(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).to(torch.cuda.current_device())

    @cached_property
    def labels_T(self) -> Tensor:
        """Tokens whose log-probs are asked for, [T]."""
        return (torch.arange(self.tokens) * 5 % self.vocab).to(torch.cuda.current_device())

    @cached_property
    def upstream_T(self) -> Tensor:
        """What the loss weighs tokens by: over several magnitudes and both signs, [T]."""
        generator = torch.Generator().manual_seed(99)
        sizes_T = torch.randn(self.tokens, generator=generator, dtype=torch.float64).exp()
        return (sizes_T * (1 - 2 * (torch.arange(self.tokens) % 2))).to(torch.cuda.current_device())

    def sides(self, hidden_TH: Tensor) -> dict[Model, Side]:
        """The models as this rank's kernels take them; the policy's weight and ``hidden_TH`` get gradients."""
        axis = groups.tensor()
        rows = self.padded // axis.size
        first = axis.rank * rows
        group = axis.group if axis.size > 1 else None
        made: dict[Model, Side] = {}
        for name in THREE:
            other_TH, weight_VH = self.models[name]
            shard_VH = weight_VH[first : first + rows].clone().requires_grad_(name == "policy")
            head = VocabHead(shard_VH, self.vocab, first_column=first, group=group, temperature=self.temperature)
            made[name] = Side(hidden_TH if name == "policy" else other_TH, head)
        made["sharing"] = Side(made["reference"].hidden_TH, made["dpo"].head)
        return made


@dataclass(frozen=True)
class Expected:
    """A check's values [T] and the policy's gradients (None where the check has none)."""

    values: Values
    hidden_TH: Tensor | None
    weight_VH: Tensor | None


def dense(check: KernelCheck, problem: KernelProblem, logits: Callable[[Tensor, Tensor], Tensor]) -> Expected:
    """The check from whole logits [T, V], which ``logits`` makes of hidden states and true rows of a head."""
    leaves = {
        name: tuple(x.clone().requires_grad_(name == "policy") for x in problem.models[name]) for name in check.models
    }
    whole = [logits(hidden, weight[: problem.vocab]) / problem.temperature for hidden, weight in leaves.values()]
    values = check.dense(whole, problem.labels_T)
    if not check.backward:
        return Expected(tuple(value.detach() for value in values), None, None)
    (values[0] * problem.upstream_T.to(values[0].dtype)).sum().backward()
    hidden_TH, weight_VH = leaves["policy"]
    return Expected(tuple(value.detach() for value in values), hidden_TH.grad, weight_VH.grad)


def in_float64(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
    """Logits of the very operands, in float64."""
    return hidden_TH.double() @ weight_VH.double().T


def in_own_type(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
    """Logits rounded to the operands' type, statistics in float32: what a plain bf16 model computes."""
    return (hidden_TH @ weight_VH.T).float()


def exact(check: KernelCheck, problem: KernelProblem) -> Expected:
    """Float64 values and gradients of the problem's numbers."""
    doubles = replace(problem, dtype=torch.float64)
    doubles.__dict__["models"] = {name: (h.double(), weight.double()) for name, (h, weight) in problem.models.items()}
    return dense(check, doubles, in_float64)


def bounds(check: KernelCheck, problem: KernelProblem, expected: Expected) -> Bounds:
    """What errors are allowed: fixed, or in bf16 those of the dense bf16 formulation."""
    words = (check.words * problem.tokens + check.words_in_all) / problem.tokens if groups.tensor().size > 1 else 0
    if problem.dtype in ERROR_BOUND:
        return Bounds(ERROR_BOUND[problem.dtype], ERROR_BOUND[problem.dtype], words)
    plain = dense(check, problem, in_own_type)
    gradient = 0.0
    if plain.hidden_TH is not None and plain.weight_VH is not None:
        assert expected.hidden_TH is not None
        assert expected.weight_VH is not None
        gradient = max(
            relative_error(plain.hidden_TH, expected.hidden_TH),
            relative_error(plain.weight_VH[: problem.vocab], expected.weight_VH[: problem.vocab]),
        )
    return Bounds(_value_error(plain.values, expected.values) + BF16_MARGIN, gradient + BF16_MARGIN, words)


def measure(check: KernelCheck, problem: KernelProblem, expected: Expected, settings: KernelSettings) -> Measurement:
    """Run the kernel as a model would, behind Megatron-Core's region operator, and compare."""
    if torch.cuda.is_available():
        _run(check, problem, settings)  # tuning and libraries' own memory come with the first call
    run = _run(check, problem, settings)
    gradient_error = 0.0
    if run.leaf_gradient is not None:
        gradient_error = _gradient_error(problem, expected, run.leaf_gradient, run.head)
    value_error = _value_error(run.values, expected.values)
    return Measurement(value_error, gradient_error, run.recorder.words / problem.tokens, run.recorder.peak_bytes)


@dataclass(frozen=True)
class _Run:
    """One call's values, the gradient of the hidden states as the last layer gets it, and the head with its own."""

    values: Values
    leaf_gradient: Tensor | None
    head: VocabHead
    recorder: Recorder


def _run(check: KernelCheck, problem: KernelProblem, settings: KernelSettings) -> _Run:
    leaf, whole_TH = _behind_the_region(problem)
    hidden_TH = whole_TH.detach().requires_grad_()
    sides = problem.sides(hidden_TH)
    call = check.prepared([sides[name] for name in check.models], problem.labels_T, settings)

    def both_passes() -> Values:
        values = call()
        if check.backward:
            (values[0] * problem.upstream_T.to(values[0].dtype)).sum().backward()
        return tuple(value.detach() for value in values)

    values, recorder = recorded(both_passes)
    if check.backward:
        assert hidden_TH.grad is not None
        whole_TH.backward(hidden_TH.grad)
    return _Run(values, leaf.grad, sides["policy"].head, recorder)


def _behind_the_region(problem: KernelProblem) -> tuple[Tensor, Tensor]:
    """The policy's hidden states as the model's last layer leaves them on this rank, and whole [T, H]."""
    axis, (hidden_TH, _) = groups.tensor(), problem.models["policy"]
    if problem.sequence_parallel:
        leaf = hidden_TH.chunk(axis.size)[axis.rank].clone().requires_grad_()
        return leaf, gather_from_sequence_parallel_region(leaf, tensor_parallel_output_grad=True)
    leaf = hidden_TH.clone().requires_grad_()
    return leaf, copy_to_tensor_model_parallel_region(leaf)


def _value_error(values: Values, expected: Values) -> float:
    errors = [relative_error(value, exact) for value, exact in zip(values, expected, strict=True)]
    return worst(errors)


def _gradient_error(problem: KernelProblem, expected: Expected, hidden_gradient: Tensor, head: VocabHead) -> float:
    """The larger relative error of the gradients of hidden states and head, the latter over all shards."""
    axis = groups.tensor()
    assert expected.hidden_TH is not None
    assert expected.weight_VH is not None
    assert head.weight.grad is not None
    expected_TH = expected.hidden_TH
    hidden_off = hidden_gradient.double() - (
        expected_TH.chunk(axis.size)[axis.rank] if problem.sequence_parallel else expected_TH
    )
    weight_off = head.weight.grad.double()  # of the padding too, whose gradient is zero
    shard = slice(head.first_column, head.first_column + head.valid_columns)
    weight_off[: head.valid_columns] -= expected.weight_VH[shard]
    squares = torch.stack([hidden_off.square().sum(), weight_off.square().sum()])
    if axis.size > 1:
        dist.all_reduce(squares, group=axis.group)
    if not problem.sequence_parallel:
        squares[0] /= axis.size
    norms = torch.stack([expected_TH.norm(), expected.weight_VH[: problem.vocab].norm()])
    return worst((squares.sqrt() / norms).tolist())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64."""
    return float((actual.double() - expected).norm() / expected.norm())
