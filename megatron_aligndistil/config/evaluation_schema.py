"""The keys of ``aligndistil evaluate``: models, a run's layout, sampling, the judge, and each benchmark's own section.

Dataclasses are not frozen, since OmegaConf must be able to merge overrides into them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from omegaconf import MISSING

from megatron_aligndistil.config.analysis_schema import (
    AnalysisTrainerConfig,
    AnswerRewardConfig,
    PassesModelConfig,
)
from megatron_aligndistil.config.optional import OptionalFloat, OptionalInt, OptionalStr
from megatron_aligndistil.config.rollout_schema import VLLMConfig


@dataclass(kw_only=True)
class EvaluationModelConfig(PassesModelConfig):
    """``model``: the layout, the lengths, and a model; ``model=<path>`` is short for the last."""

    restore_from_path: OptionalStr = None  # shown under its folder's name; more of them, or other names: models


@dataclass(kw_only=True)
class AnswerSamplingConfig:
    """``sampling``: how answers are drawn; keys as in ``model.rollout``."""

    engine: str = "hf"  # hf (transformers on every rank) | vllm
    max_new_tokens: OptionalInt = None  # of an answer; default: the benchmark's
    temperature: OptionalFloat = None  # default: the benchmark's, which may differ by category
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    sync_bucket_mib: int = 256
    hf_batch_size: int = 16
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


@dataclass(kw_only=True)
class JudgeConfig:
    """``judge``: a model behind an OpenAI-compatible endpoint."""

    base_url: OptionalStr = None  # such as http://host:8000/v1
    model: OptionalStr = None
    api_key_variable: OptionalStr = None  # environment variable that holds the key
    max_tokens: OptionalInt = None  # of a judgment; default: the benchmark's
    timeout_seconds: float = 120.0
    attempts: int = 6  # of a request to a busy or failing endpoint
    concurrency: int = 8  # requests at a time
    extra_body: dict[str, Any] = field(default_factory=dict)  # further keys of every request


@dataclass(kw_only=True)
class EvaluationConfig:
    """What every evaluation has."""

    output: str = MISSING  # folder of the results
    cache_dir: OptionalStr = None  # answers and judgments; default: ~/.cache/megatron_aligndistil/evaluation
    models: dict[str, str] = field(default_factory=dict)  # name: path
    outputs: dict[str, str] = field(default_factory=dict)  # name: a file of ready answers, in the benchmark's format
    trainer: AnalysisTrainerConfig = field(default_factory=AnalysisTrainerConfig)
    model: EvaluationModelConfig = field(default_factory=EvaluationModelConfig)
    sampling: AnswerSamplingConfig = field(default_factory=AnswerSamplingConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    bootstrap_samples: int = 2000
    seed: int = 1234


@dataclass(kw_only=True)
class AlpacaEvalConfig:
    """``benchmark`` of alpaca_eval."""

    # Holds reference_outputs.json, instruction_difficulty.csv and df_gamed.csv; default: from the hub.
    folder: OptionalStr = None


@dataclass(kw_only=True)
class AlpacaEvalEvaluationConfig(EvaluationConfig):
    model: EvaluationModelConfig = field(default_factory=partial(EvaluationModelConfig, encoder_seq_length=4096))
    benchmark: AlpacaEvalConfig = field(default_factory=AlpacaEvalConfig)


@dataclass(kw_only=True)
class MTBenchConfig:
    """``benchmark`` of mt_bench."""

    # Holds question.jsonl, judge_prompts.jsonl and reference_answer/<name>.jsonl; default: an installed FastChat's,
    # else the hub's.
    folder: OptionalStr = None
    reference: str = "gpt-4"  # whose reference answers


@dataclass(kw_only=True)
class MTBenchEvaluationConfig(EvaluationConfig):
    model: EvaluationModelConfig = field(default_factory=partial(EvaluationModelConfig, encoder_seq_length=4096))
    benchmark: MTBenchConfig = field(default_factory=MTBenchConfig)


@dataclass(kw_only=True)
class ArenaHardConfig:
    """``benchmark`` of arena_hard."""

    folder: str = MISSING  # holds question.jsonl and model_answer/<baseline>.jsonl
    baseline: str = "gpt-4-0314"
    judge_prompt: OptionalStr = None  # upstream's judge YAML (system_prompt, prompt_template); default: a built-in one
    strong_weight: int = 3  # how often a verdict of >> counts
    style_control: bool = True


@dataclass(kw_only=True)
class ArenaHardEvaluationConfig(EvaluationConfig):
    model: EvaluationModelConfig = field(default_factory=partial(EvaluationModelConfig, encoder_seq_length=8192))
    benchmark: ArenaHardConfig = field(default_factory=ArenaHardConfig)


@dataclass(kw_only=True)
class PairwiseConfig:
    """``benchmark`` of pairwise and tldr (paper Table 4)."""

    prompts: list[str] = field(default_factory=list)  # files, folders, hub names
    limit: int = -1  # prompts, drawn with the seed; -1: all
    baseline: str = "sft"  # its name among models and outputs
    judge_prompt: OptionalStr = None  # a text file with {question}, {answer_a} and {answer_b}; default: a built-in one


@dataclass(kw_only=True)
class PairwiseEvaluationConfig(EvaluationConfig):
    benchmark: PairwiseConfig = field(default_factory=PairwiseConfig)
    reward: AnswerRewardConfig = field(default_factory=AnswerRewardConfig)


@dataclass(kw_only=True)
class TLDREvaluationConfig(PairwiseEvaluationConfig):
    benchmark: PairwiseConfig = field(default_factory=lambda: PairwiseConfig(limit=1000))


@dataclass(kw_only=True)
class MeanRewardConfig:
    """``benchmark`` of reward."""

    prompts: list[str] = field(default_factory=list)
    limit: int = -1


@dataclass(kw_only=True)
class RewardEvaluationConfig(EvaluationConfig):
    benchmark: MeanRewardConfig = field(default_factory=MeanRewardConfig)
    reward: AnswerRewardConfig = field(default_factory=AnswerRewardConfig)


@dataclass(kw_only=True)
class JudgeAgreementConfig:
    """``benchmark`` of judge-agreement."""

    pairs: list[str] = field(default_factory=list)  # preference pairs of which people preferred the chosen response
    limit: int = -1
    judge_prompt: OptionalStr = None


@dataclass(kw_only=True)
class JudgeAgreementEvaluationConfig(EvaluationConfig):
    benchmark: JudgeAgreementConfig = field(default_factory=JudgeAgreementConfig)


EVALUATIONS: dict[str, type[EvaluationConfig]] = {
    "alpaca_eval": AlpacaEvalEvaluationConfig,
    "mt_bench": MTBenchEvaluationConfig,
    "arena_hard": ArenaHardEvaluationConfig,
    "tldr": TLDREvaluationConfig,
    "pairwise": PairwiseEvaluationConfig,
    "reward": RewardEvaluationConfig,
    "judge-agreement": JudgeAgreementEvaluationConfig,
}
