"""Rules on processes, parallel sizes and micro-batches, judged from the configuration alone; see ``rules``."""

from __future__ import annotations

from collections.abc import Callable

from megatron_aligndistil.config.schema import RunConfig


def data_parallel_size(config: RunConfig) -> int:
    """Replicas of the model: processes ÷ (TP × PP × CP)."""
    model = config.model
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    return config.trainer.num_nodes * config.trainer.devices // replica


def processes_fit_the_layout(config: RunConfig) -> str | None:
    model, trainer = config.model, config.trainer
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    replica = tp * pp * model.context_parallel_size
    world = trainer.num_nodes * trainer.devices
    if world % replica:
        return (
            f"trainer.num_nodes={trainer.num_nodes} x trainer.devices={trainer.devices}: {world} processes are not a "
            f"multiple of tensor {tp} x pipeline {pp} x context {model.context_parallel_size} parallel = {replica}; "
            f"change trainer.devices or a model.*_parallel_size"
        )
    return None


def micro_batches_divide_the_global_batch(config: RunConfig) -> str | None:
    model = config.model
    replicas = data_parallel_size(config)
    if model.global_batch_size % (model.micro_batch_size * replicas):
        return (
            f"model.global_batch_size={model.global_batch_size}: not a multiple of model.micro_batch_size="
            f"{model.micro_batch_size} x {replicas} data-parallel replicas; change one of them"
        )
    return None


def virtual_pipeline_has_a_pipeline(config: RunConfig) -> str | None:
    model = config.model
    chunks, pp = model.virtual_pipeline_model_parallel_size, model.pipeline_model_parallel_size
    if chunks is None:
        return None
    key = f"model.virtual_pipeline_model_parallel_size={chunks}"
    if chunks < 2:
        return f"{key}: model chunks a stage must be at least 2; use null for an ordinary pipeline"
    if pp < 2:
        return f"{key}: needs model.pipeline_model_parallel_size of at least 2, not {pp}"
    return None


def virtual_pipeline_gets_whole_rounds_of_micro_batches(config: RunConfig) -> str | None:
    """The interleaved schedule takes micro-batches in rounds of PP. Packed data is padded to that by the trainer."""
    model = config.model
    if model.virtual_pipeline_model_parallel_size is None or model.data.batching == "packed":
        return None
    micro_batches = model.global_batch_size // (model.micro_batch_size * data_parallel_size(config))
    pp = model.pipeline_model_parallel_size
    if micro_batches % pp:
        return (
            f"model.virtual_pipeline_model_parallel_size={model.virtual_pipeline_model_parallel_size}: "
            f"{micro_batches} micro-batches a step are not a multiple of {pp} pipeline stages; "
            f"change model.global_batch_size or model.micro_batch_size"
        )
    return None


def sequence_parallel_has_tensor_parallel(config: RunConfig) -> str | None:
    model = config.model
    if model.sequence_parallel and model.tensor_model_parallel_size < 2:
        return "model.sequence_parallel=true: needs model.tensor_model_parallel_size of at least 2; raise it, or false"
    return None


def context_parallel_is_not_asked_of_a_cpu(config: RunConfig) -> str | None:
    model = config.model
    if model.context_parallel_size == 1:
        return None
    key = f"model.context_parallel_size={model.context_parallel_size}"
    if config.trainer.accelerator == "cpu":
        return f"{key}: needs Transformer Engine on GPUs, and trainer.accelerator=cpu; set it to 1"
    if model.transformer_engine is False:
        return f"{key}: needs Transformer Engine; remove model.transformer_engine=false or set it to 1"
    return None


def context_parallel_rows_are_not_packed(config: RunConfig) -> str | None:
    model = config.model
    if model.context_parallel_size == 1 or model.data.batching != "packed":
        return None
    key = f"model.context_parallel_size={model.context_parallel_size}"
    return f"{key}: packed rows are not cut over context ranks; set model.data.batching=bucketed or the size to 1"


def transformer_engine_is_not_asked_of_a_cpu_or_of_fp64(config: RunConfig) -> str | None:
    for key, value in (("accelerator", "cpu"), ("precision", "64")):
        if config.model.transformer_engine and getattr(config.trainer, key) == value:
            return f"model.transformer_engine=true: does not run with trainer.{key}={value}; remove one of them"
    return None


def recomputation_is_complete(config: RunConfig) -> str | None:
    model = config.model
    prefix = "model.activations_checkpoint"
    if model.activations_checkpoint_granularity == "full":
        for part in ("method", "num_layers"):
            if getattr(model, f"activations_checkpoint_{part}") is None:
                value = "uniform" if part == "method" else "1"
                return f"{prefix}_granularity=full: needs {prefix}_{part}, such as {prefix}_{part}={value}"
        return None
    for part in ("method", "num_layers"):
        value = getattr(model, f"activations_checkpoint_{part}")
        if value is not None:
            return f"{prefix}_{part}={value}: has no effect without {prefix}_granularity=full; add that or remove this"
    return None


LAYOUT_RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    processes_fit_the_layout,
    micro_batches_divide_the_global_batch,
    virtual_pipeline_has_a_pipeline,
    virtual_pipeline_gets_whole_rounds_of_micro_batches,
    sequence_parallel_has_tensor_parallel,
    context_parallel_is_not_asked_of_a_cpu,
    context_parallel_rows_are_not_packed,
    transformer_engine_is_not_asked_of_a_cpu_or_of_fp64,
    recomputation_is_complete,
)
