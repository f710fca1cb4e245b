"""What the certificate leaves open of the kernels on gloo ranks: how many collectives, no tokens, the parts' order."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_aligndistil.certificate.recorder import recorded
from megatron_aligndistil.kernels.extrapolated_kl import Teacher, extrapolated_kl, teacher_scalars, token_statistics
from megatron_aligndistil.kernels.partials import gather_partials
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_kl import token_kl
from megatron_aligndistil.kernels.token_kl.reference import dense_token_kl
from megatron_aligndistil.kernels.token_logprob import token_logprob, token_logprob_and_entropy
from tests.distributed.harness import run_ranks
from tests.unit.kernels.problems import ADAPTIVE, Shape, models, relative_error

SHAPE = Shape(vocab=61, padded=64)  # 13 tokens; the last shard is part padding


def _collectives(settings: KernelSettings) -> dict[str, list[int]]:
    """Elements that this rank gave to each collective of a call; those of all backward passes together."""
    place = (dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    (hidden_TH, head), d, r = (model.leaf(*place) for model in models(SHAPE, torch.float32))
    labels_T = torch.zeros(SHAPE.tokens, dtype=torch.int64)
    scalars, of_scalars = recorded(lambda: teacher_scalars(*d, *r, ADAPTIVE, settings))
    teacher = Teacher(*d, *r, scalars=scalars)
    result, of_kl = recorded(lambda: extrapolated_kl(hidden_TH, head, teacher, settings))
    _, of_statistics = recorded(lambda: token_statistics(result, teacher, head.group))
    logprob_T, of_logprob = recorded(lambda: token_logprob(hidden_TH, head, labels_T, settings))
    (with_entropy_T, _), of_entropy = recorded(lambda: token_logprob_and_entropy(hidden_TH, head, labels_T, settings))
    kl_T, of_token_kl = recorded(lambda: token_kl(hidden_TH, head, *d, settings))
    _, of_backward = recorded(lambda: (result.kl + logprob_T + with_entropy_T + kl_T).sum().backward())
    recorders = {
        "teacher_scalars": of_scalars,
        "extrapolated_kl": of_kl,
        "token_statistics": of_statistics,
        "token_logprob": of_logprob,
        "token_logprob_and_entropy": of_entropy,
        "token_kl": of_token_kl,
        "backward": of_backward,
    }
    return {name: [elements for _, elements in recorder.collectives] for name, recorder in recorders.items()}


@pytest.mark.parametrize("plan", ["store", "recompute"])
def test_collectives_of_every_call(plan: str) -> None:
    """One whatever the number of chunks; under the store plan, which needs the result at once, one a chunk."""
    settings = KernelSettings(plan=plan, chunk_tokens=5)  # type: ignore[arg-type]
    for seen in run_ranks(2, _collectives, settings):
        scalars = seen.pop("teacher_scalars")
        assert sum(scalars) == 7 * SHAPE.tokens
        assert len(scalars) == 9  # normalisers, TVD, log Z* of each of three chunks
        chunks = [5, 5, 3] if plan == "store" else [SHAPE.tokens]
        words = {"extrapolated_kl": 3, "token_logprob": 3, "token_logprob_and_entropy": 4, "token_kl": 5}
        expected = {name: [count * tokens for tokens in chunks] for name, count in words.items()}
        assert seen == {**expected, "token_statistics": [SHAPE.tokens], "backward": []}


def _no_tokens() -> None:
    settings = KernelSettings(chunk_tokens=4)
    place = (dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    (hidden_TH, head), d, r = (model.leaf(*place) for model in models(Shape(tokens=0), torch.float32))
    teacher = Teacher(*d, *r, scalars=teacher_scalars(*d, *r, ADAPTIVE, settings))
    total = extrapolated_kl(hidden_TH, head, teacher, settings).kl.sum() + token_kl(hidden_TH, head, *d, settings).sum()
    (total + token_logprob(hidden_TH, head, torch.empty(0, dtype=torch.int64), settings).sum()).backward()
    assert hidden_TH.grad is not None
    assert hidden_TH.grad.shape == (0, 24)
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_no_token_on_any_rank() -> None:
    run_ranks(2, _no_tokens)


def _uneven_shards() -> list[tuple[str, int]]:
    """13 entries on two shards of 32: the second is all padding, and by itself would fit the workspace."""
    settings = KernelSettings(chunk_tokens=5, workspace_bytes=500)
    policy, other = models(Shape(vocab=13, padded=64), torch.float32, count=2)
    place = (dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    hidden_TH, head = policy.leaf(*place)
    other_leaf = other.leaf(*place)
    kl_T, recorder = recorded(lambda: token_kl(hidden_TH, head, *other_leaf, settings))
    expected_T = dense_token_kl(policy.hidden_TH, policy.weight_VH, other.hidden_TH, other.weight_VH, 13)
    assert relative_error(kl_T.detach(), expected_T) <= 1e-5
    return recorder.collectives


def test_ranks_with_uneven_shards_choose_the_same_plan() -> None:
    first, second = run_ranks(2, _uneven_shards, timeout_seconds=60)
    assert first == second
    assert len(first) == 1


def _gather_ranks() -> None:
    partials_KT = torch.full((2, 3), float(dist.get_rank()))
    gathered_RKT = gather_partials(partials_KT, dist.group.WORLD)
    assert gathered_RKT.shape == (dist.get_world_size(), 2, 3)
    assert [float(part.unique()) for part in gathered_RKT] == [float(rank) for rank in range(dist.get_world_size())]


def test_partials_arrive_in_rank_order() -> None:
    run_ranks(3, _gather_ranks)
