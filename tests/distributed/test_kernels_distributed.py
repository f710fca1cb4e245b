"""The kernels over a vocabulary sharded on gloo ranks: values, gradients, collectives.

A rank checks everything in one process start and returns its figures, which the test asserts and can print.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding

from megatron_aligndistil.kernels.extrapolated_kl import Extrapolation, Teacher, extrapolated_kl, teacher_scalars
from megatron_aligndistil.kernels.extrapolated_kl.reference import dense_extrapolated_kl, dense_teacher_scalars
from megatron_aligndistil.kernels.partials import gather_partials
from megatron_aligndistil.kernels.token_kl import token_kl
from megatron_aligndistil.kernels.token_kl.reference import dense_token_kl
from megatron_aligndistil.kernels.token_logprob import token_logprob
from megatron_aligndistil.kernels.token_logprob.reference import dense_token_logprob
from megatron_aligndistil.types import VocabHead
from tests.distributed.harness import run_ranks
from tests.unit.kernels.problems import (
    ADAPTIVE,
    CONSTANT,
    GRADIENT_TOLERANCE,
    Shape,
    models,
    relative_error,
    upstream,
)
from tests.unit.kernels.recorder import recorded

# The second has shards that are all padding at TP = 2 and 4, the third one that is partly padding.
SHAPES = (Shape(vocab=61, padded=64), Shape(vocab=13, padded=64), Shape(vocab=37, padded=40))
CHUNKS = (1, 5, 100)


@dataclass(frozen=True)
class Figure:
    """The worst relative error of one quantity."""

    name: str
    dtype: torch.dtype
    error: float


def _summed(partial_TH: Tensor) -> Tensor:
    """What the backward pass of Megatron's copy_to_tensor_model_parallel_region does."""
    whole_TH = partial_TH.clone()
    dist.all_reduce(whole_TH)
    return whole_TH


def _shard_of(gradient_VH: Tensor, head: VocabHead) -> Tensor:
    return gradient_VH[head.first_column : head.first_column + head.weight.shape[0]]


def _gradient_figures(
    op: str, dtype: torch.dtype, hidden_TH: Tensor, head: VocabHead, expected: tuple[Tensor, Tensor]
) -> list[Figure]:
    hidden_expected_TH, weight_expected_VH = expected
    assert hidden_TH.grad is not None
    assert head.weight.grad is not None
    weight_expected = _shard_of(weight_expected_VH, head)[: head.valid_columns]
    difference = head.weight.grad[: head.valid_columns].double() - weight_expected
    assert not head.weight.grad[head.valid_columns :].any()
    whole_norm = weight_expected_VH.norm()  # of the whole head: an empty shard has no norm of its own
    return [
        Figure(f"{op} dH", dtype, relative_error(_summed(hidden_TH.grad), hidden_expected_TH)),
        Figure(f"{op} dW", dtype, float(difference.norm() / whole_norm)),
    ]


def _check_logprob(shape: Shape, dtype: torch.dtype, chunk_tokens: int) -> list[Figure]:
    (model,) = models(shape, dtype, count=1)
    labels_T = torch.arange(shape.tokens) * 5 % shape.vocab
    hidden_TH, head = model.leaf(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    weights_T, dense = upstream(shape.tokens, dtype), model.dense()
    logprob_T = token_logprob(hidden_TH, head, labels_T, chunk_tokens)
    expected_T = dense_token_logprob(dense.hidden_TH, dense.weight_VH, labels_T, shape.vocab)
    (weights_T * logprob_T).sum().backward()
    (weights_T.double() * expected_T).sum().backward()
    expected = (dense.hidden_TH.grad, torch.nan_to_num(dense.weight_VH.grad))
    value = Figure("token_logprob value", dtype, relative_error(logprob_T.detach(), expected_T.detach()))
    return [value, *_gradient_figures("token_logprob", dtype, hidden_TH, head, expected)]


def _check_token_kl(shape: Shape, dtype: torch.dtype, chunk_tokens: int) -> list[Figure]:
    policy, other = models(shape, dtype, count=2)
    place = (dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    hidden_TH, head = policy.leaf(*place)
    weights_T, dense = upstream(shape.tokens, dtype), policy.dense()
    kl_T = token_kl(hidden_TH, head, *other.leaf(*place), chunk_tokens)
    expected_T = dense_token_kl(dense.hidden_TH, dense.weight_VH, other.hidden_TH, other.weight_VH, shape.vocab)
    (weights_T * kl_T).sum().backward()
    (weights_T.double() * expected_T).sum().backward()
    value = Figure("token_kl value", dtype, relative_error(kl_T.detach(), expected_T.detach()))
    return [
        value,
        *_gradient_figures("token_kl", dtype, hidden_TH, head, (dense.hidden_TH.grad, dense.weight_VH.grad)),
    ]


def _check_extrapolated(shape: Shape, dtype: torch.dtype, chunk: int, extrapolation: Extrapolation) -> list[Figure]:
    three = models(shape, dtype)
    place = (dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    (hidden_TH, head), d, r = (model.leaf(*place) for model in three)
    teacher = Teacher(*d, *r, scalars=teacher_scalars(*d, *r, extrapolation, chunk))
    result = extrapolated_kl(hidden_TH, head, teacher, chunk)
    policy, *pair = (model.dense() for model in three)
    expected, weights_T = dense_extrapolated_kl(policy, *pair, extrapolation), upstream(shape.tokens, dtype)
    (weights_T * result.kl).sum().backward()
    (weights_T.double() * expected.kl).sum().backward()
    figures = [
        Figure(f"{op} {field.name}", dtype, relative_error(getattr(actual, field.name).detach(), reference.detach()))
        for op, actual, dense in (
            ("teacher_scalars", teacher.scalars, dense_teacher_scalars(*pair, extrapolation)),
            ("extrapolated_kl", result, expected),
        )
        for field in fields(dense)
        for reference in (getattr(dense, field.name),)
    ]
    gradients = (policy.hidden_TH.grad, policy.weight_VH.grad)
    return [*figures, *_gradient_figures("extrapolated_kl", dtype, hidden_TH, head, gradients)]


def _all_figures() -> list[Figure]:
    worst: dict[tuple[str, torch.dtype], Figure] = {}
    for dtype in (torch.float32, torch.float64):
        for shape in SHAPES:
            for chunk_tokens in CHUNKS:
                figures = _check_logprob(shape, dtype, chunk_tokens) + _check_token_kl(shape, dtype, chunk_tokens)
                for extrapolation in (ADAPTIVE, CONSTANT, replace(ADAPTIVE, alpha=40.0)):
                    figures += _check_extrapolated(shape, dtype, chunk_tokens, extrapolation)
                for figure in figures:
                    key = (figure.name, figure.dtype)
                    # Not max(): a NaN must win.
                    if key not in worst or not figure.error <= worst[key].error:
                        worst[key] = figure
    return list(worst.values())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_values_and_gradients_equal_the_reference(ranks: int) -> None:
    for rank, figures in enumerate(run_ranks(ranks, _all_figures)):
        assert len(figures) == 2 * (3 + 3 + 11)
        for figure in figures:
            assert figure.error <= GRADIENT_TOLERANCE[figure.dtype], (rank, figure)
        if rank == 0:
            print("\n".join(f"TP={ranks} {f.name:26} {f.dtype!s:14} {f.error:.1e}" for f in figures))


def _collectives() -> dict[str, list[tuple[str, int]]]:
    shape, chunk_tokens = SHAPES[0], 5  # 13 tokens: 3 chunks
    three = models(shape, torch.float32)
    place = (dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    (hidden_TH, head), d, r = (model.leaf(*place) for model in three)
    labels_T = torch.zeros(shape.tokens, dtype=torch.int64)
    scalars, of_scalars = recorded(lambda: teacher_scalars(*d, *r, ADAPTIVE, chunk_tokens))
    result, of_kl = recorded(lambda: extrapolated_kl(hidden_TH, head, Teacher(*d, *r, scalars=scalars), chunk_tokens))
    logprob_T, of_logprob = recorded(lambda: token_logprob(hidden_TH, head, labels_T, chunk_tokens))
    kl_T, of_token_kl = recorded(lambda: token_kl(hidden_TH, head, *d, chunk_tokens))
    _, of_backward = recorded(lambda: (result.kl + logprob_T + kl_T).sum().backward())
    recorders = {
        "teacher_scalars": of_scalars,
        "extrapolated_kl": of_kl,
        "token_logprob": of_logprob,
        "token_kl": of_token_kl,
        "backward": of_backward,
    }
    return {name: recorder.collectives for name, recorder in recorders.items()}


def test_collectives_and_words_a_token() -> None:
    gather = "allgather_"
    for seen in run_ranks(2, _collectives):
        assert seen == {
            "teacher_scalars": [
                (gather, words * tokens) for tokens in (5, 5, 3) for words in (4, 1, 2)
            ],  # 7 words a token
            "extrapolated_kl": [(gather, 4 * 13)],
            "token_logprob": [(gather, 3 * 13)],
            "token_kl": [(gather, 5 * 13)],
            "backward": [],
        }


def _no_tokens() -> None:
    place = (dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    (hidden_TH, head), d, r = (model.leaf(*place) for model in models(Shape(tokens=0), torch.float32))
    teacher = Teacher(*d, *r, scalars=teacher_scalars(*d, *r, ADAPTIVE, 4))
    total = extrapolated_kl(hidden_TH, head, teacher, 4).kl.sum() + token_kl(hidden_TH, head, *d, 4).sum()
    (total + token_logprob(hidden_TH, head, torch.empty(0, dtype=torch.int64), 4).sum()).backward()
    assert hidden_TH.grad is not None
    assert hidden_TH.grad.shape == (0, 24)
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_no_token_on_any_rank() -> None:
    run_ranks(2, _no_tokens)


def _tied_weight() -> tuple[float, float]:
    """The weight is the embedding too: the lookup's gradient and the head's meet in one parameter of each rank."""
    shape, rank, ranks = SHAPES[0], dist.get_rank(), dist.get_world_size()
    (model,) = models(shape, torch.float64, count=1)
    _, head = model.leaf(rank, ranks, dist.group.WORLD)
    dense = model.dense()
    tokens_T = torch.arange(shape.tokens) * 11 % shape.vocab
    labels_T = torch.arange(shape.tokens) * 5 % shape.vocab

    held_T = (tokens_T >= head.first_column) & (tokens_T < head.first_column + head.weight.shape[0])
    local_TH = embedding((tokens_T - head.first_column).masked_fill(~held_T, 0), head.weight) * held_T[:, None]
    hidden_TH = (local_TH.detach() if ranks == 1 else _summed(local_TH.detach())).requires_grad_()
    token_logprob(hidden_TH, head, labels_T, 5).sum().backward()
    assert hidden_TH.grad is not None
    local_TH.backward(_summed(hidden_TH.grad))

    hidden_dense_TH = embedding(tokens_T, dense.weight_VH)
    dense_token_logprob(hidden_dense_TH, dense.weight_VH, labels_T, shape.vocab).sum().backward()
    expected_VH = _shard_of(dense.weight_VH.grad, head)[: head.valid_columns]
    assert head.weight.grad is not None
    actual_VH = head.weight.grad[: head.valid_columns]
    return relative_error(actual_VH, expected_VH), float(actual_VH.norm())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tied_weight(ranks: int) -> None:
    for error, norm in run_ranks(ranks, _tied_weight):
        assert norm > 0
        assert error <= 1e-10


def _gather_ranks() -> None:
    partials_KT = torch.full((2, 3), float(dist.get_rank()))
    gathered_RKT = gather_partials(partials_KT, dist.group.WORLD)
    assert gathered_RKT.shape == (dist.get_world_size(), 2, 3)
    assert [float(part.unique()) for part in gathered_RKT] == [float(rank) for rank in range(dist.get_world_size())]


def test_partials_arrive_in_rank_order() -> None:
    run_ranks(3, _gather_ranks)
