"""What is judged before any process group starts: the configuration alone, with the machine, and with the model.

Each rule is a function named as a sentence; it answers None, or one line with the key, the value and the remedy. The
rules that need the configuration only are in ``rules`` and ``layout_rules``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_aligndistil.config.layout_rules import LAYOUT_RULES, data_parallel_size
from megatron_aligndistil.config.peft_rules import PEFT_RULES
from megatron_aligndistil.config.rollout_rules import ROLLOUT_RULES
from megatron_aligndistil.config.rules import CHOICE_AND_RANGE_RULES, RULES, sequences_per_example
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.config.training_evaluation_rules import EVALUATION_RULES
from megatron_aligndistil.errors import ConfigError

__all__ = [
    "ModelShape",
    "Runtime",
    "check",
    "check_model",
    "check_runtime",
    "data_parallel_size",
    "sequences_per_example",
]


class ModelShape(Protocol):
    """The sizes of ``models.Architecture`` that a parallel layout must divide."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_query_groups(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True)
class Runtime:
    """What this machine offers. ``installed`` holds import names of optional packages."""

    gpus: int
    installed: frozenset[str]


def check(config: RunConfig) -> None:
    """Raise ConfigError for the first rule that ``config`` breaks."""
    for rule in (*CHOICE_AND_RANGE_RULES, *LAYOUT_RULES, *RULES, *PEFT_RULES, *ROLLOUT_RULES, *EVALUATION_RULES):
        _raise(rule(config))


def check_runtime(config: RunConfig, runtime: Runtime) -> None:
    """Raise ConfigError where this machine cannot run ``config``."""
    for rule in RUNTIME_RULES:
        _raise(rule(config, runtime))


def check_model(config: RunConfig, shape: ModelShape) -> None:
    """Raise ConfigError where the model does not fit the layout or the lengths of ``config``."""
    for rule in MODEL_RULES:
        _raise(rule(config, shape))


def _raise(complaint: str | None) -> None:
    if complaint is not None:
        raise ConfigError(complaint)


def runs_on_gpus(config: RunConfig, runtime: Runtime) -> bool:
    """What ``trainer.accelerator`` comes to on this machine."""
    accelerator = config.trainer.accelerator
    return accelerator == "gpu" or (accelerator == "auto" and runtime.gpus > 0)


def processes_have_a_gpu_each(config: RunConfig, runtime: Runtime) -> str | None:
    trainer = config.trainer
    if not runs_on_gpus(config, runtime):
        return None
    if runtime.gpus == 0:
        return f"trainer.accelerator={trainer.accelerator}: no GPU is visible; use auto or cpu"
    if trainer.devices > runtime.gpus:
        return f"trainer.devices={trainer.devices}: only {runtime.gpus} GPUs are visible; lower it, or accelerator=cpu"
    return None


def context_parallel_has_transformer_engine(config: RunConfig, runtime: Runtime) -> str | None:
    size = config.model.context_parallel_size
    if size == 1:
        return None
    if not runs_on_gpus(config, runtime):
        return f"model.context_parallel_size={size}: needs Transformer Engine and GPUs, none is visible; set it to 1"
    if "transformer_engine" not in runtime.installed:
        return f"model.context_parallel_size={size}: needs Transformer Engine; install the 'gpu' extra or set it to 1"
    return None


def transformer_engine_can_run_where_asked_for(config: RunConfig, runtime: Runtime) -> str | None:
    if not config.model.transformer_engine:
        return None
    if not runs_on_gpus(config, runtime):
        return "model.transformer_engine=true: no GPU is visible; remove the key"
    if "transformer_engine" not in runtime.installed:
        return "model.transformer_engine=true: not installed; install the 'gpu' extra or remove the key"
    return None


def loggers_are_installed(config: RunConfig, runtime: Runtime) -> str | None:
    if config.exp_manager.create_wandb_logger and "wandb" not in runtime.installed:
        return (
            "exp_manager.create_wandb_logger=true: wandb is not installed; install the 'wandb' extra or remove the key"
        )
    return None


def tensor_parallel_divides_attention_heads(config: RunConfig, shape: ModelShape) -> str | None:
    return _tensor_parallel_divides(config, shape.num_attention_heads, "attention heads")


def tensor_parallel_divides_query_groups(config: RunConfig, shape: ModelShape) -> str | None:
    return _tensor_parallel_divides(config, shape.num_query_groups, "key-value heads")


def tensor_parallel_divides_feed_forward(config: RunConfig, shape: ModelShape) -> str | None:
    return _tensor_parallel_divides(config, shape.ffn_hidden_size, "feed-forward columns")


def _tensor_parallel_divides(config: RunConfig, size: int, what: str) -> str | None:
    tp = config.model.tensor_model_parallel_size
    if size % tp == 0:
        return None
    return f"model.tensor_model_parallel_size={tp}: does not divide the model's {size} {what}; use {_divisors(size)}"


def pipeline_parallel_divides_layers(config: RunConfig, shape: ModelShape) -> str | None:
    pp = config.model.pipeline_model_parallel_size
    if shape.num_layers % pp == 0:
        return None
    key, layers = f"model.pipeline_model_parallel_size={pp}", shape.num_layers
    return f"{key}: does not divide the model's {layers} layers; use {_divisors(layers)}"


def virtual_pipeline_divides_stages(config: RunConfig, shape: ModelShape) -> str | None:
    chunks = config.model.virtual_pipeline_model_parallel_size or 1
    layers = shape.num_layers // config.model.pipeline_model_parallel_size
    if layers % chunks == 0:
        return None
    key = f"model.virtual_pipeline_model_parallel_size={chunks}"
    return f"{key}: does not divide the {layers} layers of a pipeline stage; use {_divisors(layers)}"


def sequences_fit_the_models_positions(config: RunConfig, shape: ModelShape) -> str | None:
    length = config.model.encoder_seq_length
    if length <= shape.max_position_embeddings:
        return None
    most = shape.max_position_embeddings
    return f"model.encoder_seq_length={length}: the model was made for {most} positions; lower it to {most} or less"


def _divisors(number: int) -> str:
    """The parallel sizes, up to 64, that divide ``number``: ``1, 3 or 9``."""
    found = [str(size) for size in range(1, min(number, 64) + 1) if number % size == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]


RUNTIME_RULES: tuple[Callable[[RunConfig, Runtime], str | None], ...] = (
    processes_have_a_gpu_each,
    context_parallel_has_transformer_engine,
    transformer_engine_can_run_where_asked_for,
    loggers_are_installed,
)
MODEL_RULES: tuple[Callable[[RunConfig, ModelShape], str | None], ...] = (
    tensor_parallel_divides_attention_heads,
    tensor_parallel_divides_query_groups,
    tensor_parallel_divides_feed_forward,
    pipeline_parallel_divides_layers,
    virtual_pipeline_divides_stages,
    sequences_fit_the_models_positions,
)
