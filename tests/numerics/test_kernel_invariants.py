"""METHOD's invariants of the AlignDistil kernels, over random problems.

A head that is the identity makes the hidden states the logits, so that logits can be chosen freely.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aligndistil.kernels.backends.backend import HeadProduct
from megatron_aligndistil.kernels.backends.choice import PYTORCH
from megatron_aligndistil.kernels.extrapolated_kl import (
    Extrapolation,
    Teacher,
    TeacherScalars,
    TokenStatistics,
    extrapolated_kl,
    teacher_scalars,
    token_statistics,
)
from megatron_aligndistil.kernels.extrapolated_kl.chunked import KLToExtrapolation
from megatron_aligndistil.kernels.extrapolated_kl.reference import (
    DenseModel,
    dense_extrapolated_kl,
    dense_token_statistics,
)
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.statistic import Statistic, Tile
from megatron_aligndistil.kernels.token_kl.reference import dense_token_kl
from megatron_aligndistil.kernels.token_logprob.chunked import LabelLogprob
from megatron_aligndistil.types import VocabHead

ADAPTIVE = Extrapolation(mode="adaptive", alpha=20.0, epsilon=1e-3, tvd_scale=1.0)
SETTINGS = KernelSettings(plan="recompute", chunk_tokens=3)

random_problems = settings(max_examples=30, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Logits:
    """Logits of policy, DPO and reference model, [T, V] each."""

    policy_TV: Tensor
    d_TV: Tensor
    r_TV: Tensor

    def to(self, dtype: torch.dtype) -> Logits:
        return Logits(self.policy_TV.to(dtype), self.d_TV.to(dtype), self.r_TV.to(dtype))


@st.composite
def logits(draw: st.DrawFn, scales: tuple[float, ...] = (0.1, 1.0, 10.0)) -> Logits:
    """Teachers from nearly equal to nearly disjoint; a vocabulary from 2 entries."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    size = (draw(st.integers(1, 7)), draw(st.integers(2, 65)))
    scale, gap = draw(st.sampled_from(scales)), draw(st.sampled_from((0.01, 0.3, 1.0)))

    def normal() -> Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    policy_TV = normal()
    d_TV = policy_TV + gap * normal()
    return Logits(policy_TV, d_TV, d_TV + gap * normal())


@dataclass(frozen=True)
class Step:
    """The kernels' results on chosen logits, and the gradient of sum(kl) with respect to the policy's logits."""

    scalars: TeacherScalars
    kl_T: Tensor
    statistics: TokenStatistics
    gradient_TV: Tensor


def _identity(logits_TV: Tensor) -> VocabHead:
    vocab = logits_TV.shape[1]
    return VocabHead(torch.eye(vocab, dtype=logits_TV.dtype), vocab)


def _step(z: Logits, extrapolation: Extrapolation, settings: KernelSettings = SETTINGS) -> Step:
    head = _identity(z.policy_TV)
    scalars = teacher_scalars(z.d_TV, head, z.r_TV, head, extrapolation, settings)
    policy_TV, teacher = z.policy_TV.clone().requires_grad_(), Teacher(z.d_TV, head, z.r_TV, head, scalars)
    result = extrapolated_kl(policy_TV, head, teacher, settings)
    (gradient_TV,) = torch.autograd.grad(result.kl.sum(), policy_TV)
    return Step(scalars, result.kl.detach(), token_statistics(result, teacher, None), gradient_TV)


def _dense(logits_TV: Tensor) -> DenseModel:
    return DenseModel(logits_TV, torch.eye(logits_TV.shape[1], dtype=torch.float64), logits_TV.shape[1])


@random_problems
@given(logits(), st.integers(1, 9), st.sampled_from(("store", "recompute")), st.integers(0, 2**32 - 1))
def test_plans_chunks_and_shifts_of_each_logit_vector_change_nothing(
    z: Logits, chunk_tokens: int, plan: Any, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shifts_3T1 = 100 * torch.randn(3, z.d_TV.shape[0], 1, generator=generator, dtype=torch.float64)
    shifted = Logits(z.policy_TV + shifts_3T1[0], z.d_TV + shifts_3T1[1], z.r_TV + shifts_3T1[2])
    step, other = _step(z, ADAPTIVE), _step(shifted, ADAPTIVE, KernelSettings(plan=plan, chunk_tokens=chunk_tokens))
    for name in ("tvd", "alpha", "log_z_star"):
        torch.testing.assert_close(getattr(other.scalars, name), getattr(step.scalars, name), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.kl_T, step.kl_T, rtol=1e-9, atol=1e-9)
    for name in ("kl_to_d", "kl_to_r", "reward"):
        values_T = (getattr(each.statistics, name) for each in (other, step))
        torch.testing.assert_close(*values_T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.gradient_TV, step.gradient_TV, rtol=1e-9, atol=1e-9)


@random_problems
@given(logits(), st.lists(st.integers(0, 65), max_size=4))
def test_any_split_of_the_vocabulary_gives_the_same(z: Logits, cuts: list[int]) -> None:
    """Uneven and empty shards, merged without processes."""
    vocab, rows = z.d_TV.shape[1], slice(0, z.d_TV.shape[0])
    whole = _step(z, ADAPTIVE)
    edges = [0, *sorted(min(cut, vocab) for cut in cuts), vocab]
    eye = torch.eye(vocab, dtype=torch.float64)
    heads = [VocabHead(eye[a:b], vocab, first_column=a) for a, b in pairwise(edges)]
    labels_T = z.policy_TV.argmin(-1)

    shards = []
    for head in heads:
        policy_TH, teacher = z.policy_TV, Teacher(z.d_TV, head, z.r_TV, head, whole.scalars)
        kl, label = KLToExtrapolation(PYTORCH, teacher, torch.float64), LabelLogprob(PYTORCH, labels_T, head, True)
        for statistic in (kl, label):
            products = (PYTORCH.product(policy_TH, head, torch.float64), *statistic.others)
            shards.append((statistic, products, Tile(rows, slice(0, head.valid_columns))))
    kl_T, reward_part_T, gradient_TV = _merged(shards[0::2])
    torch.testing.assert_close(kl_T, whole.kl_T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reward_part_T, whole.statistics.reward, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient_TV, whole.gradient_TV, rtol=1e-10, atol=1e-10)
    logprob_T, _, gradient_TV = _merged(shards[1::2])
    logprobs_TV = z.policy_TV.log_softmax(-1)
    torch.testing.assert_close(logprob_T, logprobs_TV.amin(-1), rtol=1e-10, atol=1e-10)
    one_hot_TV = torch.nn.functional.one_hot(labels_T, vocab)
    torch.testing.assert_close(gradient_TV, one_hot_TV - logprobs_TV.exp(), rtol=1e-10, atol=1e-10)


def _merged(shards: list[tuple[Statistic, tuple[HeadProduct, ...], Tile]]) -> tuple[Tensor, Tensor, Tensor]:
    """The first output, the sum of the second over shards, and the gradient of the logits [T, V]."""

    def logits(products: tuple[HeadProduct, ...], tile: Tile) -> list[Tensor]:
        made = []
        for product in products:
            made.append(product.empty(tile.rows.stop, tile.columns.stop, torch.float64))
            product.logits(tile.rows, tile.columns, made[-1])
        return made

    own = [statistic.combine(statistic.partials(logits(p, tile), tile)) for statistic, p, tile in shards]
    statistic, _, tile = shards[0]
    words_KT = statistic.combine(torch.stack([own_KT[: statistic.words] for own_KT in own]))
    finished = [shard[0].finish(words_KT, own_KT, tile.rows) for shard, own_KT in zip(shards, own, strict=True)]
    gradients = []
    for (shard, products, tile), merged in zip(shards, finished, strict=True):
        gradients.append(torch.empty(tile.rows.stop, tile.columns.stop, dtype=torch.float64))
        shard.logit_gradient(logits(products, tile), tile, merged.state, gradients[-1], fresh=True)
    second_T = torch.stack([merged.outputs[1] for merged in finished]).sum(0)
    return finished[0].outputs[0], second_T, torch.cat(gradients, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_gradient_sums_to_zero_over_the_vocabulary(dtype: torch.dtype, tolerance: float) -> None:
    @random_problems
    @given(logits())
    def check(z: Logits) -> None:
        step = _step(z.to(dtype), ADAPTIVE)
        # The rounding is that of pi (w - E[w]), so relative to the terms before they cancel.
        terms_T = step.kl_T.abs() + step.gradient_TV.abs().sum(-1) + step.scalars.log_z_star.abs() + 1
        assert (step.gradient_TV.sum(-1).abs() / terms_T).max() <= 8 * tolerance

    check()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_bounds_of_alpha_tvd_divergences_and_log_z_star(dtype: torch.dtype, rounding: float) -> None:
    @random_problems
    @given(logits(), st.sampled_from((1.0, 20.0, 40.0)), st.sampled_from((1.0, 2.0)))
    def check(z: Logits, alpha: float, tvd_scale: float) -> None:
        extrapolation = replace(ADAPTIVE, alpha=alpha, tvd_scale=tvd_scale)
        step = _step(z.to(dtype), extrapolation)
        scalars, statistics = step.scalars, step.statistics
        ceiling = alpha * tvd_scale + extrapolation.epsilon
        assert scalars.tvd.min() >= 0
        assert scalars.tvd.max() <= 1 + rounding
        assert scalars.alpha.min() >= torch.tensor(extrapolation.epsilon, dtype=dtype)
        assert scalars.alpha.max() <= ceiling * (1 + rounding)
        assert scalars.log_z_star.min() >= -rounding
        size_T = scalars.log_z_star + statistics.kl_to_d.abs() + statistics.kl_to_r.abs()
        size_T = size_T + scalars.alpha * statistics.reward.abs()
        for divergence_T in (step.kl_T, statistics.kl_to_d, statistics.kl_to_r):
            assert (divergence_T + rounding * (1 + size_T)).min() >= 0

    check()


@random_problems
@given(logits(), st.floats(-50, 50))
def test_equal_teachers_leave_the_kl_to_them_weighted_by_beta0_over_epsilon(z: Logits, shift: float) -> None:
    """pi_d = pi_r, whatever the shift between their logits: L = (beta0 / epsilon) KL(pi_p || pi_d)."""
    beta0 = 0.1
    step = _step(replace(z, r_TV=z.d_TV + shift), ADAPTIVE)
    eye = torch.eye(z.d_TV.shape[1], dtype=torch.float64)
    expected_T = beta0 / ADAPTIVE.epsilon * dense_token_kl(z.policy_TV, eye, z.d_TV, eye, z.d_TV.shape[1])
    torch.testing.assert_close(beta0 / step.scalars.alpha * step.kl_T, expected_T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.float64, 4e-15)])
@pytest.mark.parametrize("mode", ["adaptive", "constant"])
def test_policy_at_the_target_has_zero_loss_and_gradient(dtype: torch.dtype, rounding: float, mode: str) -> None:
    @random_problems
    @given(logits(), st.floats(-50, 50))
    def check(z: Logits, shift: float) -> None:
        extrapolation = Extrapolation(mode=mode, alpha=2.0, epsilon=1e-3, tvd_scale=1.0)  # type: ignore[arg-type]
        z = z.to(dtype)
        alpha_T1 = _step(z, extrapolation).scalars.alpha[:, None]
        target_TV = z.d_TV + alpha_T1 * (z.d_TV - z.r_TV) + shift
        step = _step(replace(z, policy_TV=target_TV), extrapolation)
        size = 1 + target_TV.abs().max()  # of the numbers that were rounded
        assert step.kl_T.abs().max() <= rounding * size
        assert step.gradient_TV.abs().max() <= rounding * size

    check()


@random_problems
@given(logits(), st.sampled_from((0.5, 10.0)))
def test_authors_formula_gives_the_same_number(z: Logits, beta2: float) -> None:
    """TVD without 1/2 times beta2: as ``tvd_scale: 2`` with alpha = beta2, and as alpha = 2 beta2."""
    tvd_T = (z.d_TV.softmax(-1) - z.r_TV.softmax(-1)).abs().sum(-1)
    weight_T1 = (beta2 * tvd_T + 1e-3)[:, None]
    target_TV = (z.d_TV + weight_T1 * (z.d_TV - z.r_TV)).log_softmax(-1)
    logprob_TV = z.policy_TV.log_softmax(-1)
    expected_T = (logprob_TV.exp() * (logprob_TV - target_TV)).sum(-1)
    for extrapolation in (replace(ADAPTIVE, alpha=beta2, tvd_scale=2.0), replace(ADAPTIVE, alpha=2 * beta2)):
        step = _step(z, extrapolation)
        # A small TVD is a difference of probabilities up to 1, so its rounding is absolute.
        torch.testing.assert_close(step.scalars.alpha, weight_T1.squeeze(1), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(step.kl_T, expected_T, rtol=1e-9, atol=1e-9)


@random_problems
@given(logits(scales=(300.0, 1000.0)), st.floats(-1000, 1000))
def test_logits_of_a_thousand_are_stable_in_fp32(z: Logits, shift: float) -> None:
    """alpha = 40 on fp32 logits of 1e3 with a common shift: as good as the inputs, relative to the largest term."""
    z = Logits(z.policy_TV + shift, z.d_TV + shift, z.r_TV - shift).to(torch.float32)
    extrapolation = replace(ADAPTIVE, alpha=40.0)
    step = _step(z, extrapolation)
    policy_TV = z.policy_TV.double().requires_grad_()
    expected_T = dense_extrapolated_kl(_dense(policy_TV), _dense(z.d_TV), _dense(z.r_TV), extrapolation)
    (gradient_TV,) = torch.autograd.grad(expected_T.sum(), policy_TV)
    statistics = dense_token_statistics(_dense(policy_TV), _dense(z.d_TV), _dense(z.r_TV))
    size = float((1 + step.scalars.alpha).max() * max(float(x.abs().max()) for x in (z.policy_TV, z.d_TV, z.r_TV)))
    assert (step.kl_T.double() - expected_T).abs().max() <= 1e-6 * size
    for name in ("kl_to_d", "kl_to_r", "reward"):
        difference_T = getattr(step.statistics, name).double() - getattr(statistics, name)
        assert difference_T.abs().max() <= 1e-6 * size, name
    assert (step.gradient_TV.double() - gradient_TV).abs().max() <= 1e-6 * size
