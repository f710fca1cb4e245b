"""Rules on a run's ``evaluation``, judged from the configuration alone; see ``rules``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_aligndistil.config.analysis_rules import REWARD_PATHS
from megatron_aligndistil.config.analysis_schema import SamplingConfig
from megatron_aligndistil.config.evaluation_rules import judge_complaints
from megatron_aligndistil.config.evaluation_schema import JudgeConfig
from megatron_aligndistil.config.reward_keys import REWARD_KEYS, reward_complaint
from megatron_aligndistil.config.rollout_rules import rollout_of
from megatron_aligndistil.config.schema import RewardModelModelConfig, RunConfig
from megatron_aligndistil.config.training_evaluation_schema import TrainingEvaluationConfig
from megatron_aligndistil.config.value_rules import (
    at_least_one,
    limit,
    missing_data,
    missing_paths,
    not_negative,
    positive,
    share,
    unusable_values,
)
from megatron_aligndistil.config.vllm_keys import vllm_complaint

CHOICES: dict[str, tuple[str | None, ...]] = {
    "evaluation.sampling.engine": ("hf", "vllm"),
    "evaluation.sampling.vllm.dtype": ("bfloat16", "float16", "float32"),
    "evaluation.reward.source": (None, *REWARD_KEYS),
}
BOUNDS = (
    at_least_one(
        *(f"evaluation.sampling.{key}" for key in ("max_new_tokens", "hf_batch_size", "sync_bucket_mib")),
        *(f"evaluation.judge.{key}" for key in ("max_tokens", "attempts", "concurrency")),
    ),
    not_negative("evaluation.every_n_steps", "evaluation.sampling.temperature", "evaluation.sampling.top_k"),
    positive("evaluation.judge.timeout_seconds", "evaluation.reward.beta0", "evaluation.reward.clip"),
    limit("evaluation.limit"),
    share("evaluation.sampling.top_p"),
)
# What starts and feeds an engine of the evaluation's own; the others say how answers are drawn.
_ENGINE_KEYS = ("engine", "sync_bucket_mib", "hf_batch_size", "vllm")


def evaluation_values_can_be_used(config: RunConfig) -> str | None:
    return next(unusable_values(config, CHOICES, BOUNDS), None)


def evaluation_says_how_often(config: RunConfig) -> str | None:
    if config.evaluation.every_n_steps is None and config.evaluation != TrainingEvaluationConfig():
        return (
            "evaluation.every_n_steps=null: evaluation's other keys have no effect; set it, such as to 100, or to 0 to "
            "keep them without effect"
        )
    return None


def evaluation_can_be_made(config: RunConfig) -> str | None:
    return next(_complaints(config), None) if config.evaluation.every_n_steps else None


def _complaints(config: RunConfig) -> Iterator[str]:
    own = config.evaluation
    if isinstance(config.model, RewardModelModelConfig):
        yield (
            f"evaluation.every_n_steps={own.every_n_steps}: a reward model gives no answers; remove it, or validate "
            "with trainer.val_check_interval"
        )
    if not own.prompts:
        yield "evaluation.prompts=[]: nothing to ask; name files, folders or hub data sets, such as [test.jsonl]"
    yield from missing_data("evaluation.prompts", own.prompts)
    yield from missing_paths({f"evaluation.reward.{name}": getattr(own.reward, name) for name in REWARD_PATHS})
    yield from missing_paths({"evaluation.judge_prompt": own.judge_prompt})
    if own.reward.source is None and own.judge.base_url is None:
        yield "evaluation.reward.source=null: nothing to measure by; set it, or evaluation.judge.base_url"
    complaint = reward_complaint("evaluation.reward", own.reward)
    if complaint is not None:
        yield complaint
    yield from _judge(own)
    yield from _sampling(config)


def _judge(own: TrainingEvaluationConfig) -> Iterator[str]:
    yield from judge_complaints("evaluation.judge", own.judge)
    if own.judge.base_url is not None:
        if not own.before_training:
            yield (
                "evaluation.before_training=false: the judge compares with the answers before training; remove it, or "
                "evaluation.judge"
            )
        return
    for key in ("judge_prompt", "cache_dir"):
        if getattr(own, key) is not None:
            yield f"evaluation.{key}={getattr(own, key)}: has no effect without evaluation.judge.base_url; remove it"
    if own.judge != JudgeConfig():
        yield "evaluation.judge.base_url=null: the judge's other keys have no effect; set it, or remove them"


def _sampling(config: RunConfig) -> Iterator[str]:
    own, model = config.evaluation.sampling, config.model
    longest = model.data.max_prompt_length + own.max_new_tokens
    if longest > model.encoder_seq_length:
        yield (
            f"evaluation.sampling.max_new_tokens={own.max_new_tokens}: with model.data.max_prompt_length="
            f"{model.data.max_prompt_length} up to {longest} tokens, above model.encoder_seq_length="
            f"{model.encoder_seq_length}; raise that or lower one of the two"
        )
    if rollout_of(config) is None:
        complaint = vllm_complaint("evaluation.sampling", own)
        if complaint is not None:
            yield complaint
        return
    for key in _ENGINE_KEYS:
        if getattr(own, key) != getattr(SamplingConfig(), key):
            yield f"evaluation.sampling.{key}: has no effect, the engine of model.rollout draws; remove it"


EVALUATION_RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    evaluation_values_can_be_used,
    evaluation_says_how_often,
    evaluation_can_be_made,
)
