"""Which keys of a vLLM engine's section contradict one another."""

from __future__ import annotations

from megatron_aligndistil.config.analysis_schema import SamplingConfig
from megatron_aligndistil.config.evaluation_schema import AnswerSamplingConfig
from megatron_aligndistil.config.rollout_schema import RolloutConfig


def vllm_complaint(section: str, settings: RolloutConfig | SamplingConfig | AnswerSamplingConfig) -> str | None:
    """What contradicts itself in the keys of a vLLM server that runs elsewhere."""
    vllm = settings.vllm
    if vllm.base_url is not None:
        for key in ("port", "python"):
            if getattr(vllm, key) is not None:
                return (
                    f"{section}.vllm.{key}={getattr(vllm, key)}: has no effect with {section}.vllm.base_url="
                    f"{vllm.base_url}, which runs already; remove one of them"
                )
        if settings.engine != "vllm":
            return f"{section}.vllm.base_url={vllm.base_url}: add {section}.engine=vllm, or remove it"
    return None
