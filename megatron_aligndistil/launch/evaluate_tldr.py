"""``aligndistil evaluate tldr`` (paper Table 4): summaries against the SFT model's, by a judge and a reward model."""

from __future__ import annotations

from megatron_aligndistil.config.evaluation_schema import TLDREvaluationConfig
from megatron_aligndistil.evaluation.pairwise import SUMMARY_PROMPT
from megatron_aligndistil.launch.evaluate_pairwise import Comparison, judge_prompt


def prepare(config: TLDREvaluationConfig) -> Comparison:
    """Prompts that ask for a summary."""
    return Summaries("tldr", "TL;DR", config, judge_prompt(config.benchmark.judge_prompt, SUMMARY_PROMPT))


class Summaries(Comparison):
    """Short answers."""

    max_new_tokens = 128
