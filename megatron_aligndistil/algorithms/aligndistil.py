"""AlignDistil (paper Eq. 16-19): distil an extrapolation of the DPO model into the policy, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Algorithm, Assembled, Experience, Role, RoleOutput
from megatron_aligndistil.algorithms.statistics import hidden_states
from megatron_aligndistil.config.schema import AlignDistilConfig, AlignDistilRunConfig
from megatron_aligndistil.kernels.extrapolated_kl import (
    Extrapolation,
    Teacher,
    extrapolated_kl,
    summed_statistics,
    teacher_scalars,
)
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_kl import token_kl
from megatron_aligndistil.kernels.token_logprob import token_logprob
from megatron_aligndistil.losses.aligndistil import aligndistil_loss, token_weights
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, LossOutput


@dataclass(frozen=True)
class Annotation:
    """A micro-batch's teacher; the initial model and the responses' own rewards [T] where they are measured."""

    teacher: Teacher
    initial: RoleOutput | None
    token_reward: Tensor | None


def aligndistil(config: AlignDistilRunConfig) -> Algorithm:
    """Minimise Σ_t β_t KL(π_θ ‖ softmax z*_t), teachers frozen.

    With the contrastive reward z* = z_d + α_t (z_d - z_r) (Eq. 17). With the vanilla one the weight starts from the
    initial model, z* = z_ref + α_t (z_d - z_ref) (Eq. 11): the same extrapolation from π_ref with the opposite sign.
    """
    settings, kernel = config.model.aligndistil, KernelSettings.of(config.model.kernel)
    contrastive = settings.reward == "contrastive"
    sign = 1.0 if contrastive else -1.0
    base, other = ("dpo", "reverse_dpo") if contrastive else ("initial", "dpo")
    extrapolation = Extrapolation(
        settings.weight,  # type: ignore[arg-type]
        sign * settings.alpha,
        sign * settings.epsilon,
        settings.tvd_scale,
    )

    def annotate(batch: Batch, outputs: Mapping[str, RoleOutput]) -> Annotation:
        b, o = outputs[base], outputs[other]
        scalars = teacher_scalars(b.kept, b.head, o.kept, o.head, extrapolation, kernel)
        reward_T = None
        if settings.measure_token_reward:
            base_T, other_T = (token_logprob(x.kept, x.head, batch.response_labels, kernel) for x in (b, o))
            reward_T = sign * settings.beta0 * (base_T - other_T)
        return Annotation(Teacher(b.kept, b.head, o.kept, o.head, scalars), outputs.get("initial"), reward_T)

    def loss(policy: Projection, batch: Batch, annotation: Annotation) -> LossOutput:
        teacher, group = annotation.teacher, policy.head.group
        divergence = extrapolated_kl(policy.hidden_TH, policy.head, teacher, kernel)
        alpha_T = sign * teacher.scalars.alpha
        weight_T = token_weights(alpha_T, settings.beta0, batch, settings.normalize_by_length)
        output = aligndistil_loss(divergence.kl, weight_T, batch.n_sequences)
        totals = summed_statistics(divergence, teacher, group)
        values = {
            "alpha": alpha_T,
            "beta": settings.beta0 / alpha_T,
            "tvd": teacher.scalars.tvd,
            "kl_to_teacher": divergence.kl,
            "kl_to_dpo": totals.kl_to_d if contrastive else totals.kl_to_r,
            "expected_reward": settings.beta0 * sign * totals.reward,
        }
        if not contrastive:
            values["kl_to_initial"] = totals.kl_to_d
        elif annotation.initial is not None:
            initial = annotation.initial
            hidden_TH = policy.hidden_TH.detach()
            values["kl_to_initial"] = token_kl(hidden_TH, policy.head, initial.kept, initial.head, kernel)
        if annotation.token_reward is not None:
            values["token_reward"] = annotation.token_reward
        return with_token_metrics(output, values, maxima=("alpha", "beta"))

    off_policy = Algorithm("aligndistil", "demonstration", loss, roles=_roles(config, settings), annotate=annotate)
    if settings.source == "dataset":
        return off_policy
    # The teachers run with every step all the same: their hidden states are too large to keep for a whole rollout.
    return replace(off_policy, kind="prompt", experience=Experience(lambda drawn, state: Assembled([{}] * len(drawn))))


def _roles(config: AlignDistilRunConfig, settings: AlignDistilConfig) -> dict[str, Role]:
    roles = {"dpo": Role(settings.dpo_path, "model.aligndistil.dpo_path", hidden_states)}
    if settings.reward == "contrastive":
        path = settings.reverse_dpo_path or ""
        roles["reverse_dpo"] = Role(path, "model.aligndistil.reverse_dpo_path", hidden_states)
    if settings.reward == "vanilla" or settings.measure_initial_kl:
        path = settings.initial_path or config.model.restore_from_path
        roles["initial"] = Role(path, "model.aligndistil.initial_path", hidden_states)
    return roles


def with_token_metrics(output: LossOutput, values: Mapping[str, Tensor], maxima: tuple[str, ...]) -> LossOutput:
    """``output`` with the mean of each value, per token [T] or already summed (0-d), and the maximum of those named."""
    detached = {name: value.detach() for name, value in values.items()}
    count = torch.tensor(
        float(max(value.numel() for value in values.values() if value.dim())), device=output.total.device
    )
    sums = {name: (value.sum(), count) for name, value in detached.items()}
    peaks = {f"{name}_max": detached[name].max() for name in maxima if detached[name].numel()}
    return replace(output, sums={**output.sums, **sums}, maxima={**output.maxima, **peaks})
