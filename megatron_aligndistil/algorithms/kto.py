"""KTO: single responses that are desirable or not, against a KL that is estimated over the whole global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import Algorithm, Estimate, Role, RoleOutput, Trajectory
from megatron_aligndistil.algorithms.statistics import sequence_logprobs
from megatron_aligndistil.config.schema import KTORunConfig
from megatron_aligndistil.losses.kto import KTOSettings, kto_loss
from megatron_aligndistil.models.heads import Projection
from megatron_aligndistil.types import Batch, Example, LossOutput
from megatron_aligndistil.types import Sequence as TokenSequence

_KL = "kl"


def kto(config: KTORunConfig) -> Algorithm:
    """KTO against a frozen reference (by default the model that training starts from).

    z₀ is computed once a step: forward passes of policy and reference over mismatched prompts and responses of the
    global batch. So neither micro-batches nor data-parallel ranks change it, and the pass with gradients is no longer
    for it.
    """
    section, logprobs = config.model.kto, sequence_logprobs(config.model.kernel)
    settings = KTOSettings(section.beta, section.desirable_weight, section.undesirable_weight)

    def annotate(batch: Batch, outputs: Mapping[str, RoleOutput]) -> Tensor:
        return outputs["reference"].kept

    def loss(policy: Projection, batch: Batch, reference_N: Tensor) -> LossOutput:
        assert batch.desirable is not None
        return kto_loss(logprobs(policy, batch), reference_N, batch.desirable, batch.constants[_KL], settings)

    reference = Role(
        path=section.reference_path or config.model.restore_from_path,
        config_key="model.kto.reference_path",
        keep=logprobs,
    )
    longest = config.model.encoder_seq_length
    return Algorithm(
        name="kto",
        kind="unpaired",
        loss=loss,
        roles={"reference": reference},
        annotate=annotate,
        estimate=Estimate(
            examples=lambda examples: mismatched(examples, longest),
            constants=lambda trajectories: {_KL: mean_log_ratio(trajectories)},
            policy={"policy": logprobs},
            roles={"reference": reference},
        ),
    )


def mismatched(examples: Sequence[Example], longest: int) -> list[Example]:
    """The prompt of each example with the response of the one before it (the last before the first), as in TRL.

    Responses are cut so that a sequence has at most ``longest`` tokens. There are none of a single example.
    """
    if len(examples) < 2:
        return []
    made = []
    for i, (own, other) in enumerate(zip(examples, [examples[-1], *examples[:-1]], strict=True)):
        (asked,), (answered,) = own.sequences, other.sequences
        prompt, response = asked.tokens[: asked.prompt_length], answered.tokens[answered.prompt_length :]
        tokens = np.concatenate([prompt, response])[:longest]
        origin = f"{i}: the prompt of {own.origin}, the response of {other.origin}"
        made.append(Example(origin, (TokenSequence(tokens, len(prompt)),)))
    return made


def mean_log_ratio(trajectories: Sequence[Trajectory]) -> float:
    """⟨log π_θ(y'|x) - log π_ref(y'|x)⟩, nats, which estimates their KL; 0 of no trajectories.

    The sum is exact, so it doesn't depend on the order.
    """
    ratios = [float(t.statistics["policy"][0]) - float(t.statistics["reference"][0]) for t in trajectories]
    return math.fsum(ratios) / len(ratios) if ratios else 0.0
