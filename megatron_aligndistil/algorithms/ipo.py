"""IPO: a preference's log-ratios are a given distance apart, no more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Algorithm, Role, RoleOutput
from megatron_aligndistil.algorithms.statistics import sequence_logprobs
from megatron_aligndistil.config.schema import IPORunConfig
from megatron_aligndistil.losses.ipo import ipo_loss
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, LossOutput


def ipo(config: IPORunConfig) -> Algorithm:
    """IPO against a frozen reference (by default the model that training starts from)."""
    settings, logprobs = config.model.ipo, sequence_logprobs(config.model.kernel)

    def annotate(batch: Batch, outputs: Mapping[str, RoleOutput]) -> Tensor:
        return outputs["reference"].kept

    def loss(policy: Projection, batch: Batch, reference_N: Tensor) -> LossOutput:
        log_ratio_N = logprobs(policy, batch) - reference_N
        if settings.normalize_by_length:
            log_ratio_N = log_ratio_N / batch.response_lengths
        return ipo_loss(log_ratio_N, settings.beta)

    reference = Role(
        path=settings.reference_path or config.model.restore_from_path,
        config_key="model.ipo.reference_path",
        keep=logprobs,
    )
    return Algorithm(name="ipo", kind="preference", loss=loss, roles={"reference": reference}, annotate=annotate)
