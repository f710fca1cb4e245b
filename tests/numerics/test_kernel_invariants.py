"""METHOD's invariants of the AlignDistil kernels, over random problems.

A head that is the identity makes the hidden states the logits, so that logits can be chosen freely.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aligndistil.kernels.extrapolated_kl import (
    ExtrapolatedKL,
    Extrapolation,
    Teacher,
    TeacherScalars,
    extrapolated_kl,
    teacher_scalars,
)
from megatron_aligndistil.kernels.extrapolated_kl.chunked import KLToExtrapolation
from megatron_aligndistil.kernels.extrapolated_kl.reference import DenseModel, dense_extrapolated_kl
from megatron_aligndistil.kernels.head_product import HeadProduct
from megatron_aligndistil.kernels.token_kl.reference import dense_token_kl
from megatron_aligndistil.kernels.token_logprob.chunked import LabelLogprob
from megatron_aligndistil.types import VocabHead

ADAPTIVE = Extrapolation(mode="adaptive", alpha=20.0, epsilon=1e-3, tvd_scale=1.0)
CHUNK = 3

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
    result: ExtrapolatedKL
    gradient_TV: Tensor


def _identity(logits_TV: Tensor) -> VocabHead:
    vocab = logits_TV.shape[1]
    return VocabHead(torch.eye(vocab, dtype=logits_TV.dtype), vocab)


def _step(z: Logits, extrapolation: Extrapolation, chunk_tokens: int = CHUNK) -> Step:
    head = _identity(z.policy_TV)
    scalars = teacher_scalars(z.d_TV, head, z.r_TV, head, extrapolation, chunk_tokens)
    policy_TV = z.policy_TV.clone().requires_grad_()
    result = extrapolated_kl(policy_TV, head, Teacher(z.d_TV, head, z.r_TV, head, scalars), chunk_tokens)
    (gradient_TV,) = torch.autograd.grad(result.kl.sum(), policy_TV)
    return Step(scalars, result, gradient_TV)


def _dense(logits_TV: Tensor) -> DenseModel:
    return DenseModel(logits_TV, torch.eye(logits_TV.shape[1], dtype=torch.float64), logits_TV.shape[1])


@random_problems
@given(logits(), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_chunks_and_shifts_of_each_logit_vector_change_nothing(z: Logits, chunk_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shifts_3T1 = 100 * torch.randn(3, z.d_TV.shape[0], 1, generator=generator, dtype=torch.float64)
    shifted = Logits(z.policy_TV + shifts_3T1[0], z.d_TV + shifts_3T1[1], z.r_TV + shifts_3T1[2])
    step, other = _step(z, ADAPTIVE), _step(shifted, ADAPTIVE, chunk_tokens)
    for name in ("tvd", "alpha", "log_z_star"):
        torch.testing.assert_close(getattr(other.scalars, name), getattr(step.scalars, name), rtol=1e-9, atol=1e-9)
    for name in ("kl", "kl_to_d", "kl_to_r", "reward"):
        torch.testing.assert_close(getattr(other.result, name), getattr(step.result, name), rtol=1e-9, atol=1e-9)
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
        teacher = Teacher(z.d_TV, head, z.r_TV, head, whole.scalars)
        logits_TV = HeadProduct(z.policy_TV, head, torch.float64).logits_CV(rows)
        shards.append((logits_TV, KLToExtrapolation(teacher, torch.float64), LabelLogprob(labels_T, head)))
    merged = shards[0][1].merge(torch.stack([kl.partials_KC(x, rows) for x, kl, _ in shards]))
    gradient_TV = torch.cat([kl.logit_gradient_CV(x, rows, merged.state) for x, kl, _ in shards], dim=1)
    expected = (whole.result.kl, whole.result.kl_to_d, whole.result.kl_to_r, whole.result.reward)
    torch.testing.assert_close(merged.outputs, tuple(x.detach() for x in expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient_TV, whole.gradient_TV, rtol=1e-10, atol=1e-10)

    logprobs = shards[0][2].merge(torch.stack([label.partials_KC(x, rows) for x, _, label in shards]))
    expected_T = z.policy_TV.log_softmax(-1).amin(-1)
    torch.testing.assert_close(logprobs.outputs[0], expected_T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_gradient_sums_to_zero_over_the_vocabulary(dtype: torch.dtype, tolerance: float) -> None:
    @random_problems
    @given(logits())
    def check(z: Logits) -> None:
        step = _step(z.to(dtype), ADAPTIVE)
        # The rounding is that of pi (w - E[w]), so relative to the terms before they cancel.
        terms_T = step.result.kl.detach().abs() + step.gradient_TV.abs().sum(-1) + step.scalars.log_z_star.abs() + 1
        assert (step.gradient_TV.sum(-1).abs() / terms_T).max() <= 8 * tolerance

    check()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_bounds_of_alpha_tvd_divergences_and_log_z_star(dtype: torch.dtype, rounding: float) -> None:
    @random_problems
    @given(logits(), st.sampled_from((1.0, 20.0, 40.0)), st.sampled_from((1.0, 2.0)))
    def check(z: Logits, alpha: float, tvd_scale: float) -> None:
        extrapolation = replace(ADAPTIVE, alpha=alpha, tvd_scale=tvd_scale)
        step = _step(z.to(dtype), extrapolation)
        scalars, result = step.scalars, step.result
        ceiling = alpha * tvd_scale + extrapolation.epsilon
        assert scalars.tvd.min() >= 0
        assert scalars.tvd.max() <= 1 + rounding
        assert scalars.alpha.min() >= torch.tensor(extrapolation.epsilon, dtype=dtype)
        assert scalars.alpha.max() <= ceiling * (1 + rounding)
        assert scalars.log_z_star.min() >= -rounding
        size_T = scalars.log_z_star + result.kl_to_d.abs() + result.kl_to_r.abs() + scalars.alpha * result.reward.abs()
        for divergence_T in (result.kl, result.kl_to_d, result.kl_to_r):
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
    torch.testing.assert_close(beta0 / step.scalars.alpha * step.result.kl.detach(), expected_T, rtol=1e-9, atol=1e-9)


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
        assert step.result.kl.abs().max() <= rounding * size
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
        torch.testing.assert_close(step.scalars.alpha, weight_T1.squeeze(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(step.result.kl.detach(), expected_T, rtol=1e-9, atol=1e-9)


@random_problems
@given(logits(scales=(300.0, 1000.0)), st.floats(-1000, 1000))
def test_logits_of_a_thousand_are_stable_in_fp32(z: Logits, shift: float) -> None:
    """alpha = 40 on fp32 logits of 1e3 with a common shift: as good as the inputs, relative to the largest term."""
    z = Logits(z.policy_TV + shift, z.d_TV + shift, z.r_TV - shift).to(torch.float32)
    extrapolation = replace(ADAPTIVE, alpha=40.0)
    step = _step(z, extrapolation)
    policy_TV = z.policy_TV.double().requires_grad_()
    expected = dense_extrapolated_kl(_dense(policy_TV), _dense(z.d_TV), _dense(z.r_TV), extrapolation)
    (gradient_TV,) = torch.autograd.grad(expected.kl.sum(), policy_TV)
    size = float((1 + step.scalars.alpha).max() * max(float(x.abs().max()) for x in (z.policy_TV, z.d_TV, z.r_TV)))
    for name in ("kl", "kl_to_d", "kl_to_r", "reward"):
        difference_T = getattr(step.result, name).double() - getattr(expected, name)
        assert difference_T.abs().max() <= 1e-6 * size, name
    assert (step.gradient_TV.double() - gradient_TV).abs().max() <= 1e-6 * size
