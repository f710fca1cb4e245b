"""The kernels' checks: each call on this layout's vocabulary shards against float64 from whole logits.

Shapes: T tokens, H hidden size, V vocabulary including padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_aligndistil.certificate import formulas
from megatron_aligndistil.kernels.extrapolated_kl import (
    Extrapolation,
    Teacher,
    extrapolated_kl,
    summed_statistics,
    teacher_scalars,
    token_statistics,
)
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_kl import token_kl
from megatron_aligndistil.kernels.token_logprob import token_logprob, token_logprob_and_entropy
from megatron_aligndistil.types import VocabHead

Values = tuple[Tensor, ...]
Model = Literal["policy", "dpo", "reference", "sharing"]
THREE: tuple[Model, ...] = ("policy", "dpo", "reference")


@dataclass(frozen=True)
class Side:
    """One model at the same T tokens, as a kernel takes it: hidden states [T, H] and this rank's part of the head."""

    hidden_TH: Tensor
    head: VocabHead


@dataclass(frozen=True)
class KernelCheck:
    """One kernel.

    words           elements a token that the call must send, forward and backward together
    models          what it reads: the policy, which alone gets a gradient, the DPO model, a reference, or a reference
                    whose head is the DPO model's
    prepared        everything that comes before the call, returning the call; its first value is differentiable and
                    [T] where ``backward`` says so
    dense           the same values from whole logits
    words_in_all    elements that the call must send beside those of tokens
    """

    words: int
    models: tuple[Model, ...]
    prepared: Callable[[Sequence[Side], Tensor, KernelSettings], Callable[[], Values]]
    dense: Callable[[Sequence[Tensor], Tensor], Values]
    backward: bool = True
    words_in_all: int = 0


def _logprob(with_entropy: bool) -> KernelCheck:
    def prepared(sides: Sequence[Side], labels_T: Tensor, settings: KernelSettings) -> Callable[[], Values]:
        (policy,) = sides
        if with_entropy:
            return lambda: token_logprob_and_entropy(policy.hidden_TH, policy.head, labels_T, settings)
        return lambda: (token_logprob(policy.hidden_TH, policy.head, labels_T, settings),)

    def dense(logits: Sequence[Tensor], labels_T: Tensor) -> Values:
        (logits_TV,) = logits
        logprob_T = formulas.label_logprob(logits_TV, labels_T)
        return (logprob_T, formulas.entropy(logits_TV)) if with_entropy else (logprob_T,)

    return KernelCheck(4 if with_entropy else 3, ("policy",), prepared, dense)


def _token_kl(direction: Literal["to_other", "from_other"]) -> KernelCheck:
    def prepared(sides: Sequence[Side], labels_T: Tensor, settings: KernelSettings) -> Callable[[], Values]:
        policy, other = sides
        return lambda: (
            token_kl(
                policy.hidden_TH, policy.head, other.hidden_TH, other.head, settings=settings, direction=direction
            ),
        )

    def dense(logits: Sequence[Tensor], labels_T: Tensor) -> Values:
        policy_TV, other_TV = logits
        return (formulas.kl(*((policy_TV, other_TV) if direction == "to_other" else (other_TV, policy_TV))),)

    return KernelCheck(5, ("policy", "dpo"), prepared, dense)


def _alpha(how: Extrapolation, tvd_T: Tensor) -> Tensor:
    return formulas.token_alpha(how.mode == "adaptive", how.alpha, how.epsilon, how.tvd_scale, tvd_T)


def _teacher(d: Side, r: Side, how: Extrapolation, settings: KernelSettings) -> Teacher:
    scalars = teacher_scalars(d.hidden_TH, d.head, r.hidden_TH, r.head, how, settings)
    return Teacher(d.hidden_TH, d.head, r.hidden_TH, r.head, scalars)


def _teacher_scalars(how: Extrapolation) -> KernelCheck:
    def prepared(sides: Sequence[Side], labels_T: Tensor, settings: KernelSettings) -> Callable[[], Values]:
        d, r = sides

        def call() -> Values:
            scalars = _teacher(d, r, how, settings).scalars
            return scalars.log_z_d, scalars.log_z_r, scalars.tvd, scalars.alpha, scalars.log_z_star

        return call

    def dense(logits: Sequence[Tensor], labels_T: Tensor) -> Values:
        d_TV, r_TV = logits
        tvd_T = formulas.total_variation(d_TV, r_TV)
        alpha_T = _alpha(how, tvd_T)
        return d_TV.logsumexp(-1), r_TV.logsumexp(-1), tvd_T, alpha_T, formulas.log_z_star(d_TV, r_TV, alpha_T)

    return KernelCheck(7, THREE[1:], prepared, dense, backward=False)


def _extrapolated_kl(how: Extrapolation, folded: bool = False) -> KernelCheck:
    def prepared(sides: Sequence[Side], labels_T: Tensor, settings: KernelSettings) -> Callable[[], Values]:
        policy, d, r = sides
        teacher = _teacher(d, r, how, settings)
        return lambda: (extrapolated_kl(policy.hidden_TH, policy.head, teacher, settings, statistics=not folded).kl,)

    def dense(logits: Sequence[Tensor], labels_T: Tensor) -> Values:
        policy_TV, d_TV, r_TV = logits
        alpha_T = _alpha(how, formulas.total_variation(d_TV, r_TV))
        return (formulas.kl(policy_TV, formulas.extrapolated(d_TV, d_TV, r_TV, alpha_T)),)

    return KernelCheck(3, ("policy", "dpo", "sharing") if folded else THREE, prepared, dense)


def _statistics(how: Extrapolation, summed: bool) -> KernelCheck:
    def prepared(sides: Sequence[Side], labels_T: Tensor, settings: KernelSettings) -> Callable[[], Values]:
        policy, d, r = sides
        teacher = _teacher(d, r, how, settings)
        result = extrapolated_kl(policy.hidden_TH, policy.head, teacher, settings)

        def call() -> Values:
            statistics = (summed_statistics if summed else token_statistics)(result, teacher, policy.head.group)
            return statistics.kl_to_d, statistics.kl_to_r, statistics.reward

        return call

    def dense(logits: Sequence[Tensor], labels_T: Tensor) -> Values:
        policy_TV, d_TV, r_TV = logits
        values = (
            formulas.kl(policy_TV, d_TV),
            formulas.kl(policy_TV, r_TV),
            formulas.expected_gap(policy_TV, d_TV, r_TV),
        )
        return tuple(value_T.sum() for value_T in values) if summed else values

    if summed:
        return KernelCheck(0, THREE, prepared, dense, backward=False, words_in_all=2)
    return KernelCheck(1, THREE, prepared, dense, backward=False)


EXTRAPOLATIONS: Mapping[str, Extrapolation] = {
    "adaptive": Extrapolation(mode="adaptive", alpha=20.0, epsilon=1e-3, tvd_scale=1.0),
    "adaptive alpha=40": Extrapolation(mode="adaptive", alpha=40.0, epsilon=1e-3, tvd_scale=1.0),
    "constant": Extrapolation(mode="constant", alpha=1.5, epsilon=1e-3, tvd_scale=1.0),
}

KERNELS: Mapping[str, KernelCheck] = {
    "token_logprob": _logprob(with_entropy=False),
    "token_logprob_and_entropy": _logprob(with_entropy=True),
    "token_kl to_other": _token_kl("to_other"),
    "token_kl from_other": _token_kl("from_other"),
    **{f"teacher_scalars {name}": _teacher_scalars(how) for name, how in EXTRAPOLATIONS.items()},
    **{f"extrapolated_kl {name}": _extrapolated_kl(how) for name, how in EXTRAPOLATIONS.items()},
    "extrapolated_kl shared head": _extrapolated_kl(EXTRAPOLATIONS["adaptive"], folded=True),
    "token_statistics": _statistics(EXTRAPOLATIONS["adaptive"], summed=False),
    "summed_statistics": _statistics(EXTRAPOLATIONS["adaptive"], summed=True),
}
