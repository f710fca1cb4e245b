"""An evaluation's keys judged, before a file of its benchmark is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_aligndistil.config.analysis_rules import BOOTSTRAP_SAMPLES, REWARD_PATHS
from megatron_aligndistil.config.evaluation_schema import (
    AlpacaEvalEvaluationConfig,
    AnswerSamplingConfig,
    EvaluationConfig,
    JudgeAgreementEvaluationConfig,
    JudgeConfig,
    PairwiseEvaluationConfig,
    RewardEvaluationConfig,
)
from megatron_aligndistil.config.reward_keys import REWARD_KEYS, reward_complaint
from megatron_aligndistil.config.value_rules import (
    Bound,
    at_least_one,
    at_most,
    check_output,
    given,
    limit,
    missing_data,
    missing_paths,
    not_negative,
    positive,
    share,
    unusable_values,
)
from megatron_aligndistil.config.vllm_keys import vllm_complaint
from megatron_aligndistil.errors import ConfigError

CHOICES: dict[str, tuple[str | None, ...]] = {
    "sampling.engine": ("hf", "vllm"),
    "sampling.vllm.dtype": ("bfloat16", "float16", "float32"),
    "reward.source": (None, *REWARD_KEYS),
}
BOUNDS = (
    at_least_one(
        "sampling.max_new_tokens",
        "sampling.hf_batch_size",
        "sampling.sync_bucket_mib",
        "judge.max_tokens",
        "judge.attempts",
        "judge.concurrency",
        "benchmark.strong_weight",
    ),
    not_negative("seed", "sampling.temperature", "sampling.top_k"),
    positive("judge.timeout_seconds", "reward.beta0", "reward.clip"),
    at_most(BOOTSTRAP_SAMPLES, "bootstrap_samples"),
    Bound(("model.encoder_seq_length",), lambda number: number >= 2, "at least 2, a prompt's token and an answer's"),
    limit("benchmark.limit"),
    share("sampling.top_p"),
)
# What a request says by itself, and by which key of the judge's section or by whom.
_OF_REQUESTS = {
    "model": "model",
    "max_tokens": "max_tokens",
    **dict.fromkeys(("messages", "temperature", "logprobs", "top_logprobs"), "the evaluation"),
    **dict.fromkeys(("n", "stream"), "this command, which reads one reply as a whole"),
}
_NAME_LENGTH = 100
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_NAME_LENGTH - 1}}}")  # of a model: it becomes a file's
# Names that say how a checkpoint was written, not which it is.
_ANONYMOUS = re.compile(r"huggingface|adapter|checkpoints|step_\d+")


def models_of(config: EvaluationConfig) -> dict[str, tuple[str, str]]:
    """The models that answer: name → key, path. model.restore_from_path comes first, under its folder's name."""
    named = {name: (f"models.{name}", path) for name, path in config.models.items()}
    path = config.model.restore_from_path
    return named if path is None else {name_of(path): ("model.restore_from_path", path), **named}


def name_of(path: str) -> str:
    """A model's name by its path."""
    whole = Path(path).expanduser().resolve()
    named = next((part for part in (whole, *whole.parents) if not _ANONYMOUS.fullmatch(part.name)), whole)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", named.name)[:_NAME_LENGTH] or "model"


def check(config: EvaluationConfig) -> None:
    """Raise ConfigError for a value or a combination that cannot be used."""
    for complaint in (
        *unusable_values(config, CHOICES, BOUNDS),
        *_models(config),
        *_paths(config),
        *_judge(config),
        *_benchmark(config),
        *_without_effect(config),
    ):
        raise ConfigError(complaint)
    check_output(config.output)


def judge_complaints(section: str, judge: JudgeConfig) -> Iterator[str]:
    """What is wrong with a judge's section."""
    for key, own in _OF_REQUESTS.items():
        if key in judge.extra_body:
            by = f"{section}.{own}" if own in vars(judge) else own
            yield f"{section}.extra_body.{key}={judge.extra_body[key]}: every request has its own by {by}; remove it"
    if (judge.base_url is None) != (judge.model is None):
        yield f"{section}.base_url={judge.base_url}, {section}.model={judge.model}: set both, or neither"
    if judge.api_key_variable is not None and judge.api_key_variable not in os.environ:
        yield f"{section}.api_key_variable={judge.api_key_variable}: no such environment variable; export it"


def _models(config: EvaluationConfig) -> Iterator[str]:
    models = models_of(config)
    for section, names in (("models", config.models), ("outputs", config.outputs)):
        for name in names:
            if not _NAME.fullmatch(name):
                yield f"{section}.{name}: a name has letters, digits, '.', '_', '-', {_NAME_LENGTH} at most; rename it"
    path = config.model.restore_from_path
    for section, taken in (("models", config.models), ("outputs", config.outputs)):
        if path is not None and name_of(path) in taken:
            yield f"{section}.{name_of(path)}: model={path} has this name too; rename it"
    for name in sorted(set(config.models) & set(config.outputs)):
        yield f"outputs.{name}: a model has this name too; rename it"
    answers = not isinstance(config, JudgeAgreementEvaluationConfig)
    if answers and not models and not config.outputs:
        yield "model=null: nothing to evaluate; give model=<path>, or several: +models.a=<path> +models.b=<path>"
    if not answers and (models or config.outputs):
        yield f"{next(iter(models), 'outputs')}: a judge is compared with people's labels, no model answers; remove it"


def _paths(config: EvaluationConfig) -> Iterator[str]:
    paths: dict[str, str | None] = {key: path for key, path in models_of(config).values()}
    paths |= {f"outputs.{name}": path for name, path in config.outputs.items()}
    paths["model.data.chat_template"] = config.model.data.chat_template
    for key in ("benchmark.folder", "benchmark.judge_prompt", *(f"reward.{name}" for name in REWARD_PATHS)):
        paths |= dict.fromkeys((key,), *given(config, key))
    yield from missing_paths(paths)
    for key in ("benchmark.prompts", "benchmark.pairs"):
        for names in given(config, key):
            if not names:
                yield f"{key}=[]: nothing to ask; name files, folders or hub data sets, such as [test.jsonl]"
            yield from missing_data(key, names)


def _judge(config: EvaluationConfig) -> Iterator[str]:
    yield from judge_complaints("judge", config.judge)
    if config.judge.base_url is not None:
        if isinstance(config, RewardEvaluationConfig):
            yield f"judge.base_url={config.judge.base_url}: only a reward is measured here; remove it, or use pairwise"
    elif not isinstance(config, RewardEvaluationConfig | PairwiseEvaluationConfig):
        yield "judge.base_url=null: needs a judge; set it and judge.model, such as judge.base_url=http://host:8000/v1"


def _without_effect(config: EvaluationConfig) -> Iterator[str]:
    """Keys that nothing here reads."""
    if config.judge.base_url is None and config.judge != JudgeConfig():
        yield "judge.base_url=null: the judge's other keys have no effect; set it, or remove them"
    if config.judge.base_url is None and isinstance(config, PairwiseEvaluationConfig) and config.benchmark.judge_prompt:
        yield f"benchmark.judge_prompt={config.benchmark.judge_prompt}: has no effect without judge.base_url; remove it"
    if (
        isinstance(config, AlpacaEvalEvaluationConfig)
        and config.bootstrap_samples != EvaluationConfig.bootstrap_samples
    ):
        yield f"bootstrap_samples={config.bootstrap_samples}: the library has standard errors of its own; remove it"
    if not models_of(config) and config.sampling != AnswerSamplingConfig():
        yield "sampling: has no effect, no model answers here; remove its keys"


def _benchmark(config: EvaluationConfig) -> Iterator[str]:
    complaint = vllm_complaint("sampling", config.sampling)
    if complaint is not None:
        yield complaint
    for reward in given(config, "reward"):
        complaint = reward_complaint("reward", reward)
        if complaint is not None:
            yield complaint
        if reward.source == "vanilla" and reward.initial_path is None:
            yield "reward.source=vanilla: needs reward.initial_path, the model before alignment; add it"
        if reward.source == "function" and not models_of(config):
            yield "reward.source=function: gets prompts as a model's chat template writes them; give a model too"
        if reward.source is None and config.judge.base_url is None:
            judge = ", or judge.base_url" if isinstance(config, PairwiseEvaluationConfig) else ""
            yield f"reward.source=null: nothing to measure by; set it{judge}"
    if isinstance(config, PairwiseEvaluationConfig):
        names = [*models_of(config), *config.outputs]
        baseline = config.benchmark.baseline
        if baseline not in names:
            yield f"benchmark.baseline={baseline}: not one of the models {', '.join(names)}; correct the name"
        if len(names) < 2:
            yield f"models: {', '.join(names)}; give two or more, the baseline among them"
