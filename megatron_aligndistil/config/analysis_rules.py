"""An analysis's keys judged, and the run whose layout, data and models it uses."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_aligndistil.config.analysis_schema import (
    AnalysisConfig,
    AnalysisDataConfig,
    ExtrapolationAnalysisConfig,
    RewardAccuracyAnalysisConfig,
    TokensAnalysisConfig,
)
from megatron_aligndistil.config.base_schema import DataConfig, ModelConfig, TrainerConfig
from megatron_aligndistil.config.evaluation_schema import EvaluationConfig
from megatron_aligndistil.config.layout_rules import LAYOUT_RULES
from megatron_aligndistil.config.reward_keys import REWARD_KEYS, reward_complaint
from megatron_aligndistil.config.rules import (
    CHOICE_AND_RANGE_RULES,
    packed_row_holds_the_longest_example,
    prompt_leaves_room_for_a_response,
)
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.config.value_rules import (
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
from megatron_aligndistil.errors import ConfigError

CHOICES: dict[str, tuple[str | None, ...]] = {
    "analysis.sampling.engine": ("hf", "vllm"),
    "analysis.sampling.vllm.dtype": ("bfloat16", "float16", "float32"),
    "analysis.reward.source": (None, *REWARD_KEYS),
    "analysis.responses": ("chosen", "rejected", "greedy"),
    "analysis.weight": ("adaptive", "constant"),
    "analysis.colour": ("alpha", "tvd", "reward", "kl_to_teacher", "kl_to_dpo"),
}
BOOTSTRAP_SAMPLES = 1_000_000  # an interval is no better by more
BOUNDS = (
    at_least_one(
        "analysis.max_new_tokens",
        "analysis.sampling.max_new_tokens",
        "analysis.sampling.hf_batch_size",
        "analysis.sampling.sync_bucket_mib",
    ),
    not_negative("analysis.seed", "analysis.sampling.temperature", "analysis.sampling.top_k"),
    positive(
        "analysis.beta0",
        "analysis.alpha",
        "analysis.epsilon",
        "analysis.tvd_scale",
        "analysis.reward.beta0",
        "analysis.reward.clip",
    ),
    at_most(BOOTSTRAP_SAMPLES, "analysis.bootstrap_samples"),
    limit("analysis.limit"),
    share("analysis.sampling.top_p"),
)
REWARD_PATHS = ("path", "dpo_path", "reverse_dpo_path", "initial_path")


def as_run(config: AnalysisConfig | EvaluationConfig, first_model: str) -> RunConfig:
    """The run of the same layout and lengths, checked; ``first_model`` is the one whose tokenizer reads the data.

    Its log folder is the output, where the ranks of several nodes leave what went wrong.

    Raises:
        ConfigError: a value or a combination that no run takes.
    """
    trainer, model = config.trainer, config.model
    shared = {name: value for name, value in vars(model).items() if name not in ("data", "restore_from_path")}
    run = RunConfig(
        trainer=TrainerConfig(**vars(trainer)),
        model=ModelConfig(restore_from_path=first_model, **shared, data=DataConfig(**vars(model.data))),
    )
    run.exp_manager.explicit_log_dir = config.output
    for rule in CHOICE_AND_RANGE_RULES:
        _raise(rule(run))
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    replicas = max(1, trainer.num_nodes * trainer.devices // replica)
    # Whole rounds of micro-batches for every replica: an analysis has no global batch.
    run.model.global_batch_size = replicas * model.micro_batch_size * model.pipeline_model_parallel_size
    for rule in (*LAYOUT_RULES, packed_row_holds_the_longest_example):
        _raise(rule(run))
    if isinstance(model.data, AnalysisDataConfig):
        _raise(prompt_leaves_room_for_a_response(run))
    return run


def check(config: AnalysisConfig) -> None:
    """Raise ConfigError for a value of the analysis's own that cannot be used."""
    for complaint in (*unusable_values(config, CHOICES, BOUNDS), *_paths(config), *_of_kind(config)):
        raise ConfigError(complaint)
    check_output(config.output)


def _raise(complaint: str | None) -> None:
    if complaint is not None:
        raise ConfigError(complaint)


def _paths(config: AnalysisConfig) -> Iterator[str]:
    models = getattr(config, "models", {})
    named = models if isinstance(models, dict) else vars(models)
    paths = {f"models.{name}": path for name, path in named.items()}
    for reward in given(config, "analysis.reward"):
        paths |= {f"analysis.reward.{name}": getattr(reward, name) for name in REWARD_PATHS}
    paths["model.data.chat_template"] = config.model.data.chat_template
    yield from missing_paths(paths)
    for key in ("train", "test", "prompts", "data"):
        for names in given(config, f"analysis.{key}"):
            yield from missing_data(f"analysis.{key}", names)


def _of_kind(config: AnalysisConfig) -> Iterator[str]:
    if isinstance(config, RewardAccuracyAnalysisConfig):
        yield from _reward_accuracy(config)
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


def _extrapolation(config: ExtrapolationAnalysisConfig) -> Iterator[str]:
    settings = config.analysis
    if not settings.constants and not settings.adaptive:
        yield "analysis.constants=[]: no variant to train; add constants, or analysis.adaptive=true"
    for constant in settings.constants:
        if not 0 < constant < float("inf"):
            yield f"analysis.constants: {constant}: out of range; must be greater than 0"
    if len(set(settings.constants)) < len(settings.constants):
        yield f"analysis.constants={settings.constants}: one is named twice; remove it"
    if not settings.prompts:
        yield "analysis.prompts=[]: no prompts; name files, folders or hub data sets, such as [test.jsonl]"
    yield from _room(config, "analysis.sampling.max_new_tokens", settings.sampling.max_new_tokens)
    complaint = reward_complaint("analysis.reward", settings.reward)
    if complaint is not None:
        yield complaint
    if settings.reward.source is None:
        yield "analysis.reward.source=null: no reward to compare by; choose model, contrastive, vanilla or function"


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
