"""The keys of a run's ``evaluation``; see ``schema``."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_aligndistil.config.analysis_schema import AnswerRewardConfig, SamplingConfig
from megatron_aligndistil.config.evaluation_schema import JudgeConfig
from megatron_aligndistil.config.optional import OptionalInt, OptionalStr


@dataclass(kw_only=True)
class TrainingEvaluationConfig:
    """``evaluation``: the policy answers fixed prompts while it trains, for a reward or a judge."""

    every_n_steps: OptionalInt = None  # null or 0: never
    before_training: bool = True  # also before the first step; a judge compares with those answers
    prompts: list[str] = field(default_factory=list)  # files, folders, hub names
    limit: int = -1  # prompts, drawn with model.seed; -1: all
    # In a run with rollouts their engine draws the answers.
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: AnswerRewardConfig = field(default_factory=AnswerRewardConfig)  # initial_path: default restore_from_path
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    judge_prompt: OptionalStr = None  # a text file with {question}, {answer_a} and {answer_b}; default: a built-in one
    cache_dir: OptionalStr = None  # judgments; default: the log folder's evaluation
