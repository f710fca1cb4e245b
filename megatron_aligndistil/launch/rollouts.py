"""From a configuration to the source that draws a run's own responses: engines, plan, scoring."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_aligndistil.algorithms.algorithm import Experience
from megatron_aligndistil.algorithms.statistics import response_logprobs
from megatron_aligndistil.checkpoint.locate import metadata_source
from megatron_aligndistil.checkpoint.metadata import copy_metadata, read_config
from megatron_aligndistil.config.rollout_rules import rollout_of
from megatron_aligndistil.config.rollout_schema import RolloutConfig
from megatron_aligndistil.config.rollout_sizes import RolloutSizes
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.data.chat import stop_token_ids
from megatron_aligndistil.data.collate import MicroBatching
from megatron_aligndistil.data.examples import ExampleSet
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.kernels.settings import MIB
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import collectives, groups
from megatron_aligndistil.rollout.engine import Engine
from megatron_aligndistil.rollout.engine_group import EngineGroup, Stream
from megatron_aligndistil.rollout.hf_engine import HFEngine
from megatron_aligndistil.trainer.experience import ExperiencePasses
from megatron_aligndistil.trainer.rollout_plan import RolloutPlan
from megatron_aligndistil.trainer.rollout_source import Prompts, RolloutSource, Scoring

logger = logging.getLogger(__name__)

RUNS_ROLLOUT, RUNS_REWARD = "model.rollout", "model.reward"  # a run's sections
ENGINE_FOLDER = "engine"  # in the log folder: config and tokenizer that a server starts from, and its log
_VLLM_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class RolloutModels:
    """What takes part in a rollout beside the engines; ``critic`` is empty where there is none."""

    chunks: Sequence[HiddenStateModel]
    critic: Sequence[HiddenStateModel]
    frozen: Mapping[str, FrozenModel]
    experience: Experience


@contextmanager
def keys_under(section: str, of: str) -> Iterator[None]:
    """Where engines and rewards are another section's than a run's ``of``, their errors name its keys."""
    try:
        yield
    except RolloutError as error:
        raise RolloutError(str(error).replace(f"{of}.", f"{section}.")) from error


def rollout_source(
    config: RunConfig, models: RolloutModels, train: ExampleSet, validation: ExampleSet | None, log_dir: Path
) -> tuple[RolloutSource, str]:
    """The source, its engines started; and the line that a resumed run must have in common.

    Raises:
        RolloutError: an engine does not start.
    """
    model, settings = config.model, rollout_of(config)
    assert settings is not None
    tokenizer = load_tokenizer(str(metadata_source(model.restore_from_path)), model.data.chat_template)
    sizes = RolloutSizes.of(settings, model.global_batch_size)
    plan = RolloutPlan.of(settings, sizes, stop_token_ids(tokenizer), model.seed)
    logger.info("rollouts by %s: %s", settings.engine, plan.line())

    def decode(tokens: np.ndarray, special: bool) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=not special))

    batching = MicroBatching.from_config(model, "prompt")
    scoring_size = settings.forward_micro_batch_size
    if scoring_size is not None and batching.batching == "bucketed":
        passes_batching = replace(batching, micro_batch_size=scoring_size)
    else:
        passes_batching = batching
    passes = ExperiencePasses(models.chunks, models.critic, models.frozen, passes_batching)
    prompts = Prompts(train, validation, config.trainer.limit_val_batches, decode)
    engine, dtype = engine_of(config, settings, models.chunks[0], log_dir)
    engines = EngineGroup(engine, models.chunks, Stream(dtype, settings.sync_bucket_mib * MIB))
    scoring = Scoring(passes, models.experience, response_logprobs(model.kernel))
    return RolloutSource(prompts, plan, engines, scoring, batching), plan.line()


def engine_of(
    config: RunConfig, settings: RolloutConfig, chunk: HiddenStateModel, log_dir: Path
) -> tuple[Engine, torch.dtype]:
    """This rank's engine, and the type of its weights."""
    metadata = metadata_source(config.model.restore_from_path)
    if settings.engine == "hf":
        device = torch.device(torch.cuda.current_device())
        # CPUs without bf16 instructions take sixty times as long in it; bf16 weights are exact in fp32.
        dtype = next(chunk.parameters()).dtype if device.type == "cuda" else torch.float32
        return HFEngine(read_config(metadata), device, dtype, settings.hf_batch_size), dtype
    from megatron_aligndistil.rollout.vllm_engine import VLLMEngine

    vllm, folder = settings.vllm, log_dir / ENGINE_FOLDER
    if groups.world().rank == 0:
        copy_metadata(metadata, folder)
    collectives.barrier()
    elsewhere = vllm.base_url is not None
    generates = groups.world().rank == 0 if elsewhere else os.environ.get("LOCAL_RANK", "0") == "0"
    engine = VLLMEngine(vllm, folder, config.model.encoder_seq_length, folder, generates)
    return engine, _VLLM_DTYPES[vllm.dtype]
