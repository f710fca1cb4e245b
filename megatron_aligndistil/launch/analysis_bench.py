"""What every analysis works with in a rank: models, examples and passes of its layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_aligndistil.algorithms.algorithm import Keep, Role
from megatron_aligndistil.checkpoint.locate import metadata_source
from megatron_aligndistil.checkpoint.weights import check_weights
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.data.collate import MicroBatching
from megatron_aligndistil.data.examples import Coordination, ExampleSet, load_examples
from megatron_aligndistil.data.records import Kind
from megatron_aligndistil.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.evaluation.passes import Passes
from megatron_aligndistil.launch.models import checked_architecture, frozen_models, model_settings
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.policy import ModelSettings
from megatron_aligndistil.parallel import collectives, setup
from megatron_aligndistil.parallel.setup import Layout
from megatron_aligndistil.types import Example

# Sequences a replica at a time: of passes that keep numbers, and of those that keep hidden states.
NUMBERS_WINDOW, HIDDEN_WINDOW = 256, 64


@dataclass(frozen=True)
class Named:
    """A model that the user gave under ``key``; ``scalar`` where it must be a reward model."""

    key: str
    path: str
    scalar: bool = False


@dataclass(frozen=True)
class Pairs:
    """Preference pairs as single sequences: 2i is the chosen one of pair i, 2i + 1 the rejected one."""

    examples: ExampleSet
    indices: np.ndarray

    def __len__(self) -> int:
        return 2 * len(self.indices)

    def read(self, indices: Sequence[int]) -> list[Example]:
        """The sequences at ``indices``, each pair read once."""
        places = sorted({index // 2 for index in indices})
        pairs = dict(zip(places, self.examples[self.indices[places]], strict=True))
        return [replace(pairs[index // 2], sequences=(pairs[index // 2].sequences[index % 2],)) for index in indices]


@dataclass(frozen=True)
class Bench:
    """A rank's place in the layout, its settings, and the run whose keys they are."""

    run: RunConfig
    settings: ModelSettings

    def models(self, named: Sequence[Named], keep: Keep) -> dict[str, FrozenModel]:
        """The sharded models without gradients, by key; one a path, and adapters share their base."""
        # Adapters are modules under their roles' names, which take no dots.
        roles = {f"model_{i}": Role(own.path, own.key, keep, own.scalar) for i, own in enumerate(named)}
        made = frozen_models(self.run, roles, self.settings)
        return {own.key: made[role] for own, role in zip(named, roles, strict=True)}

    def model(self, named: Named, keep: Keep) -> FrozenModel:
        """One of them."""
        return self.models([named], keep)[named.key]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The models' own, with the chat template of the configuration."""
        model = self.run.model
        return load_tokenizer(str(metadata_source(model.restore_from_path)), model.data.chat_template)

    def passes(self, window: int) -> Passes:
        """Forward-only passes of single sequences."""
        return Passes(MicroBatching.from_config(self.run.model, "demonstration"), window)

    def examples(self, names: Sequence[str], kind: Kind, responses: str = "chosen") -> ExampleSet:
        """The tokenized rows of files, folders or hub data sets."""
        data = replace(self.run.model.data, responses=responses)
        data.data_prefix = replace(data.data_prefix, train=list(names))
        length = self.run.model.encoder_seq_length
        coordination = Coordination(os.environ.get("LOCAL_RANK", "0") == "0", collectives.barrier)
        loaded, _ = load_examples(data, "train", kind, self.tokenizer(), length, None, coordination)
        return loaded


@contextmanager
def bench(run: RunConfig) -> Iterator[Bench]:
    """The layout's process groups, started and ended."""
    layout = Layout.of(run.model)
    setup.initialize(layout, run.model.seed, run.trainer.accelerator, run.trainer.timeout_minutes)
    try:
        yield Bench(run, model_settings(run, layout))
    finally:
        setup.shutdown()


def check_models(run: RunConfig, models: Sequence[Named]) -> None:
    """Look at every model before the first is loaded: one that cannot be used shows at once.

    Raises:
        CheckpointError: a path is no model, of the other kind than is needed, or a file of it is missing or cut short.
        ConfigError: a model does not fit the layout or the lengths.
        DataError: its tokenizer cannot be read.
    """
    for own in models:
        checked_architecture(run, own.key, own.path, own.scalar)
        check_weights(own.path)
        load_tokenizer(str(metadata_source(own.path)), run.model.data.chat_template)


def check_tokenizers(models: Sequence[Named]) -> None:
    """Raise CheckpointError where a model's tokenizer is not the first one's."""
    fingerprints: dict[str, str] = {}
    for model in models:
        if model.path not in fingerprints:
            fingerprints[model.path] = tokenizer_fingerprint(load_tokenizer(str(metadata_source(model.path))))
        first = models[0]
        if fingerprints[model.path] != fingerprints[first.path]:
            raise CheckpointError(
                f"{model.key}={model.path}: its tokenizer is not the one of {first.key}={first.path}; take models of "
                "one family and tokenizer"
            )


def sampled(count: int, limit: int, seed: int) -> np.ndarray:
    """``limit`` of ``count`` indices, in order, drawn with the seed; all where the limit is -1 or above."""
    if limit in (-1, count) or limit > count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def shown_paths(models: Sequence[Named]) -> Mapping[str, str]:
    """Key → absolute path, for the settings."""
    return {model.key: str(Path(model.path).expanduser().resolve()) for model in models}
