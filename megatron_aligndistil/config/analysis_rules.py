"""An analysis's keys judged, and the run whose layout, data and models it uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from megatron_aligndistil.config.analysis_schema import (
    AnalysisConfig,
    AnswerRewardConfig,
    CompareAnalysisConfig,
    ExtrapolationAnalysisConfig,
    RewardAccuracyAnalysisConfig,
    TokensAnalysisConfig,
)
from megatron_aligndistil.config.base_schema import DataConfig, ModelConfig, TrainerConfig
from megatron_aligndistil.config.layout_rules import LAYOUT_RULES
from megatron_aligndistil.config.reward_keys import REWARD_KEYS, reward_complaint
from megatron_aligndistil.config.rules import (
    CHOICE_AND_RANGE_RULES,
    DATA_FILE_SUFFIXES,
    packed_row_holds_the_longest_example,
    prompt_leaves_room_for_a_response,
)
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError

CHOICES: dict[str, tuple[str | None, ...]] = {
    "analysis.sampling.engine": ("hf", "vllm"),
    "analysis.sampling.vllm.dtype": ("bfloat16", "float16", "float32"),
    "analysis.reward.source": (None, *REWARD_KEYS),
    "analysis.responses": ("chosen", "rejected", "greedy"),
    "analysis.weight": ("adaptive", "constant"),
    "analysis.colour": ("alpha", "tvd", "reward", "kl_to_teacher", "kl_to_dpo"),
}
AT_LEAST_ONE = (
    "analysis.bootstrap_samples",
    "analysis.max_new_tokens",
    "analysis.sampling.max_new_tokens",
    "analysis.sampling.hf_batch_size",
    "analysis.sampling.sync_bucket_mib",
    "analysis.judge.max_tokens",
    "analysis.judge.timeout_seconds",
    "analysis.judge.attempts",
    "analysis.judge.concurrency",
)
NOT_NEGATIVE = ("analysis.seed", "analysis.sampling.temperature", "analysis.sampling.top_k")
POSITIVE = (
    "analysis.beta0",
    "analysis.alpha",
    "analysis.epsilon",
    "analysis.tvd_scale",
    "analysis.reward.beta0",
    "analysis.reward.clip",
)
REWARD_PATHS = ("path", "dpo_path", "reverse_dpo_path", "initial_path")


def as_run(config: AnalysisConfig, first_model: str) -> RunConfig:
    """The run of the same layout and lengths, checked; ``first_model`` is the one whose tokenizer reads the data.

    Raises:
        ConfigError: a value or a combination that no run takes.
    """
    trainer, model = config.trainer, config.model
    shared = {name: value for name, value in vars(model).items() if name != "data"}
    run = RunConfig(
        trainer=TrainerConfig(**vars(trainer)),
        model=ModelConfig(restore_from_path=first_model, **shared, data=DataConfig(**vars(model.data))),
    )
    for rule in CHOICE_AND_RANGE_RULES:
        _raise(rule(run))
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    replicas = max(1, trainer.num_nodes * trainer.devices // replica)
    # Whole rounds of micro-batches for every replica: an analysis has no global batch.
    run.model.global_batch_size = replicas * model.micro_batch_size * model.pipeline_model_parallel_size
    for rule in (*LAYOUT_RULES, packed_row_holds_the_longest_example, prompt_leaves_room_for_a_response):
        _raise(rule(run))
    return run


def check(config: AnalysisConfig) -> None:
    """Raise ConfigError for a value of the analysis's own that cannot be used."""
    for complaint in (*_values(config), *_paths(config), *_of_kind(config)):
        raise ConfigError(complaint)
    output = Path(config.output).expanduser()
    existing = next(path for path in (output, *output.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output={config.output}: no folder can be made there; name another")


def _raise(complaint: str | None) -> None:
    if complaint is not None:
        raise ConfigError(complaint)


def _values(config: AnalysisConfig) -> Iterator[str]:
    for key, choices in CHOICES.items():
        for value in _given(config, key):
            if value not in choices:
                allowed = ", ".join("null" if choice is None else choice for choice in choices)
                yield f"{key}={value}: not a value of this key; choose one of {allowed}"
    bounds = (
        (AT_LEAST_ONE, lambda number: number >= 1, "at least 1"),
        (NOT_NEGATIVE, lambda number: number >= 0, "0 or more"),
        (POSITIVE, lambda number: number > 0, "greater than 0"),
        (("analysis.limit",), lambda number: number == -1 or number >= 1, "-1 (all) or at least 1"),
        (("analysis.sampling.top_p",), lambda number: 0 < number <= 1, "in (0, 1]"),
    )
    for keys, holds, words in bounds:
        for key in keys:
            for value in _given(config, key):
                if value is not None and (not holds(value) or value == float("inf")):
                    yield f"{key}={value}: out of range; must be {words}"


def _given(config: AnalysisConfig, key: str) -> list[object]:
    """The value of ``key``, where this analysis has such a key."""
    try:
        return [attrgetter(key)(config)]
    except AttributeError:
        return []


def _paths(config: AnalysisConfig) -> Iterator[str]:
    models = getattr(config, "models", {})
    named = models if isinstance(models, dict) else vars(models)
    paths = {f"models.{name}": path for name, path in named.items()}
    for reward in _given(config, "analysis.reward"):
        paths |= {f"analysis.reward.{name}": getattr(reward, name) for name in REWARD_PATHS}
    paths |= {
        key: value for key in ("analysis.judge.prompt", "model.data.chat_template") for value in _given(config, key)
    }
    for key, path in paths.items():
        if path is not None and not Path(path).expanduser().exists():
            yield f"{key}={path}: no such file or folder; correct the path"
    for key in ("train", "test", "prompts", "data"):
        for names in _given(config, f"analysis.{key}"):
            for name in names:  # type: ignore[attr-defined]
                looks_local = name.endswith(DATA_FILE_SUFFIXES) or name.startswith(("/", "./", "../", "~"))
                if looks_local and not Path(name).expanduser().exists():
                    yield f"analysis.{key}: {name}: no such file or folder; correct the path"


def _of_kind(config: AnalysisConfig) -> Iterator[str]:
    if isinstance(config, RewardAccuracyAnalysisConfig):
        yield from _reward_accuracy(config)
    elif isinstance(config, CompareAnalysisConfig):
        yield from _compare(config)
    elif isinstance(config, ExtrapolationAnalysisConfig):
        yield from _extrapolation(config)
    elif isinstance(config, TokensAnalysisConfig):
        yield from _tokens(config)


def _reward_accuracy(config: RewardAccuracyAnalysisConfig) -> Iterator[str]:
    if not config.analysis.train and not config.analysis.test:
        yield "analysis.test=[]: no pairs; name files, folders or hub data sets, such as analysis.test=[test.jsonl]"
    models = config.models
    if models.reward_model is None and (models.dpo is None or (models.reverse_dpo or models.reference) is None):
        yield (
            "models: no reward can be made of those given; add models.reward_model, or models.dpo with "
            "models.reference or models.reverse_dpo"
        )


def _compare(config: CompareAnalysisConfig) -> Iterator[str]:
    names, judge = ", ".join(config.models) or "none", config.analysis.judge
    if config.analysis.baseline not in config.models:
        yield f"analysis.baseline={config.analysis.baseline}: not one of the models {names}; correct the name"
    if len(config.models) < 2:
        yield f"models: {names}; give two or more, the baseline among them: +models.sft=<path> +models.aligned=<path>"
    yield from _answers(config, config.analysis.reward, config.analysis.prompts)
    if config.analysis.reward.source is None and judge.base_url is None:
        yield "analysis.reward.source=null: nothing to compare by; set it, or analysis.judge.base_url"
    if (judge.base_url is None) != (judge.model is None):
        yield f"analysis.judge.base_url={judge.base_url}, analysis.judge.model={judge.model}: set both, or neither"
    if judge.api_key_variable is not None and judge.api_key_variable not in os.environ:
        yield f"analysis.judge.api_key_variable={judge.api_key_variable}: no such environment variable; export it"


def _extrapolation(config: ExtrapolationAnalysisConfig) -> Iterator[str]:
    settings = config.analysis
    if not settings.constants and not settings.adaptive:
        yield "analysis.constants=[]: no variant to train; add constants, or analysis.adaptive=true"
    for constant in settings.constants:
        if not 0 < constant < float("inf"):
            yield f"analysis.constants: {constant}: out of range; must be greater than 0"
    if len(set(settings.constants)) < len(settings.constants):
        yield f"analysis.constants={settings.constants}: one is named twice; remove it"
    yield from _answers(config, settings.reward, settings.prompts)
    if settings.reward.source is None:
        yield "analysis.reward.source=null: no reward to compare by; choose model, contrastive, vanilla or function"


def _answers(
    config: CompareAnalysisConfig | ExtrapolationAnalysisConfig, reward: AnswerRewardConfig, prompts: list[str]
) -> Iterator[str]:
    if not prompts:
        yield "analysis.prompts=[]: no prompts; name files, folders or hub data sets, such as [test.jsonl]"
    yield from _room(config, "analysis.sampling.max_new_tokens", config.analysis.sampling.max_new_tokens)
    complaint = reward_complaint("analysis.reward", reward)
    if complaint is not None:
        yield complaint


def _tokens(config: TokensAnalysisConfig) -> Iterator[str]:
    settings = config.analysis
    if not settings.data:
        yield "analysis.data=[]: no rows to show; name files, folders or hub data sets, such as [test.jsonl]"
    if settings.colour.startswith("kl_") and config.models.policy is None:
        yield f"analysis.colour={settings.colour}: needs models.policy; add it, or choose alpha, tvd or reward"
    if settings.responses == "greedy":
        yield from _room(config, "analysis.max_new_tokens", settings.max_new_tokens)


def _room(config: AnalysisConfig, key: str, new_tokens: int) -> Iterator[str]:
    prompt, length = config.model.data.max_prompt_length, config.model.encoder_seq_length
    if prompt + new_tokens > length:
        yield (
            f"{key}={new_tokens}: with model.data.max_prompt_length={prompt} up to {prompt + new_tokens} tokens, above "
            f"model.encoder_seq_length={length}; raise that or lower one of the two"
        )
