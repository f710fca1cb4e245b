"""TDPO1 and TDPO2: DPO with the sequential KL of each response, against a frozen reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Algorithm, Role, RoleOutput
from megatron_aligndistil.algorithms.statistics import hidden_states, sequence_logprobs
from megatron_aligndistil.config.schema import TDPO1RunConfig, TDPO2RunConfig
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_kl import token_kl
from megatron_aligndistil.losses.tdpo import tdpo1_loss, tdpo2_loss
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, LossOutput

# From summed log-probs of policy and reference and the sequential KLs, [N] each.
Loss = Callable[[Tensor, Tensor, Tensor], LossOutput]


@dataclass(frozen=True)
class Annotation:
    """A micro-batch's reference, and its log-probs of the responses [N]."""

    reference: RoleOutput
    logprob_N: Tensor


def tdpo1(config: TDPO1RunConfig) -> Algorithm:
    """-log σ(u - β (D(y_l) - D(y_w))): both KLs get a gradient."""
    beta = config.model.tdpo.beta
    return _tdpo("tdpo1", config, lambda policy_N, ref_N, kl_N: tdpo1_loss(policy_N, ref_N, kl_N, beta))


def tdpo2(config: TDPO2RunConfig) -> Algorithm:
    """-log σ(u - α (β D(y_l) - sg(β D(y_w)))): the rejected response's alone does."""
    beta, alpha = config.model.tdpo.beta, config.model.tdpo.alpha
    return _tdpo("tdpo2", config, lambda policy_N, ref_N, kl_N: tdpo2_loss(policy_N, ref_N, kl_N, beta, alpha))


def _tdpo(name: str, config: TDPO1RunConfig | TDPO2RunConfig, pair_loss: Loss) -> Algorithm:
    kernel, logprobs = KernelSettings.of(config.model.kernel), sequence_logprobs(config.model.kernel)

    def annotate(batch: Batch, outputs: Mapping[str, RoleOutput]) -> Annotation:
        reference = outputs["reference"]
        return Annotation(reference, logprobs(Projection(reference.kept, reference.head), batch))

    def loss(policy: Projection, batch: Batch, annotation: Annotation) -> LossOutput:
        other = annotation.reference
        kl_T = token_kl(policy.hidden_TH, policy.head, other.kept, other.head, kernel, "from_other")
        return pair_loss(logprobs(policy, batch), annotation.logprob_N, batch.sum_by_sequence(kl_T))

    reference = Role(
        path=config.model.tdpo.reference_path or config.model.restore_from_path,
        config_key="model.tdpo.reference_path",
        keep=hidden_states,
    )
    return Algorithm(name=name, kind="preference", loss=loss, roles={"reference": reference}, annotate=annotate)
