"""DPO and what differs from it in pairs or labels alone: reverse DPO, cDPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Algorithm, Role, RoleOutput
from megatron_aligndistil.algorithms.statistics import sequence_logprobs
from megatron_aligndistil.config.schema import DPORunConfig
from megatron_aligndistil.data.transforms import swap_pair
from megatron_aligndistil.losses.dpo import dpo_loss
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, LossOutput


def dpo(config: DPORunConfig) -> Algorithm:
    """Paper Eq. 4, against a frozen reference (by default the model that training starts from)."""
    settings, logprobs = config.model.dpo, sequence_logprobs(config.model.kernel)

    def annotate(batch: Batch, outputs: Mapping[str, RoleOutput]) -> Tensor:
        return outputs["reference"].kept

    def loss(policy: Projection, batch: Batch, reference_N: Tensor) -> LossOutput:
        return dpo_loss(logprobs(policy, batch), reference_N, settings.beta, settings.label_smoothing)

    reference = Role(
        path=settings.reference_path or config.model.restore_from_path,
        config_key="model.dpo.reference_path",
        keep=logprobs,
    )
    return Algorithm(name="dpo", kind="preference", loss=loss, roles={"reference": reference}, annotate=annotate)


def reverse_dpo(config: DPORunConfig) -> Algorithm:
    """DPO on swapped pairs: the model that prefers what people reject (paper Eq. 12)."""
    return replace(dpo(config), name="reverse_dpo", transform=swap_pair)


def cdpo(config: DPORunConfig) -> Algorithm:
    """Conservative DPO: a label is wrong with a probability above 0, ``label_smoothing``."""
    return replace(dpo(config), name="cdpo")
