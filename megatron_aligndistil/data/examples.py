"""Tokenized examples, read lazily from Arrow files that are built once and found again by what they were made of."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Indices
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from megatron_aligndistil.config.base_schema import DataConfig
from megatron_aligndistil.data.build import Recipe, build, read
from megatron_aligndistil.data.chat import ChatFormat
from megatron_aligndistil.data.records import Kind
from megatron_aligndistil.data.sources import content_fingerprint, resolve
from megatron_aligndistil.data.summary import Summary
from megatron_aligndistil.data.tokenize import TOKENIZATION_VERSION, LengthPolicy
from megatron_aligndistil.data.tokenizer import rendering_fingerprint
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.types import Example, Sequence

log = logging.getLogger(__name__)

DEFAULT_CACHE = "~/.cache/megatron_aligndistil"


@dataclass(frozen=True)
class Coordination:
    """Who builds tokenized data: one process a file system (``is_builder``); the others wait at ``barrier``."""

    is_builder: bool = True
    barrier: Callable[[], None] = lambda: None


ALONE = Coordination()


class ExampleSet:
    """A sequence of ``Example``s over memory-mapped Arrow data: only what is asked for is in memory.

    ``transform`` is applied to each example as it is read (``swap_pair``), so both directions share the data on disk.
    ``fingerprint`` is that of the tokens before the transform.
    """

    def __init__(
        self, dataset: Dataset, fingerprint: str, transform: Callable[[Example], Example] | None = None
    ) -> None:
        self.fingerprint = fingerprint
        self._rows = dataset.with_format("arrow")
        self._transform = transform

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: Indices[int] | np.ndarray) -> list[Example]: ...
    def __getitem__(self, index: int | Indices[int] | np.ndarray) -> Example | list[Example]:
        """One example, or a list of them for a list of indices (one read for all)."""
        if isinstance(index, int | np.integer):
            return self[[int(index)]][0]
        table = self._rows[[int(i) for i in index]]
        columns = (table.column(name) for name in ("origin", "prompt", "responses"))
        examples = [_example(*row) for row in zip(*columns, strict=True)]
        if "desirable" in table.column_names:
            labels = table.column("desirable").to_pylist()
            examples = [replace(e, desirable=label) for e, label in zip(examples, labels, strict=True)]
        return examples if self._transform is None else [self._transform(example) for example in examples]

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def load_examples(
    data: DataConfig,
    split: str,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    encoder_seq_length: int,
    transform: Callable[[Example], Example] | None = None,
    coordination: Coordination = ALONE,
) -> tuple[ExampleSet, Summary]:
    """Read, tokenize and cache the ``split`` ("train" or "validation") of ``model.data``.

    Every process calls it: the builder reads and tokenizes where the cache has no such data, the others wait and read.
    """
    names: list[str] = getattr(data.data_prefix, split)
    if not names:
        raise ConfigError(f"model.data.data_prefix.{split} is empty; name files, folders or hub data sets")
    sources = [part for name in names for part in resolve(name)]
    chat = ChatFormat(tokenizer)
    recipe = Recipe(sources, kind, data.responses, chat, LengthPolicy.from_config(data, encoder_seq_length))
    cache = Path(data.cache_dir or DEFAULT_CACHE).expanduser()
    dataset, summary = _built(recipe, cache, data.num_workers, coordination)
    if data.batching == "packed" and data.pack_length is not None and data.pack_length < summary.max_length:
        raise ConfigError(
            f"model.data.pack_length={data.pack_length} is below the longest example of {summary.name}, "
            f"{summary.max_length} tokens; raise it to that or lower model.encoder_seq_length"
        )
    if coordination.is_builder:
        log.info("%s data: %s", split, summary.line())
    return ExampleSet(dataset, summary.fingerprint, transform), summary


def _built(recipe: Recipe, cache: Path, workers: int, coordination: Coordination) -> tuple[Dataset, Summary]:
    if not coordination.is_builder:
        coordination.barrier()
        found = read(cache / _key(recipe), verify=False)  # the builder has
        if found is None:
            raise DataError(f"{cache}: the tokenized data wasn't built; see the error of the process that builds it")
        return found
    try:
        folder = cache / _key(recipe)
        found = read(folder)
        if found is None:
            build(recipe, folder, workers)
            found = read(folder, verify=False)
            assert found is not None
        else:
            log.info("tokenized data read from %s", folder)
        return found
    finally:
        coordination.barrier()  # after a failure too: the others then stop with an error instead of waiting


def _key(recipe: Recipe) -> str:
    """The name of the cache folder: a hash of the rows' content and of everything that turns them into tokens."""
    made_of: dict[str, Any] = {
        "version": TOKENIZATION_VERSION,
        "sources": [(source.name, content_fingerprint(source)) for source in recipe.sources],
        "kind": recipe.kind,
        "responses": recipe.responses if recipe.kind == "demonstration" else "both",
        "limits": asdict(recipe.policy),
        "tokenizer": rendering_fingerprint(recipe.chat.tokenizer),
    }
    return "tokenized-" + hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]


def _example(origin: pa.Scalar, prompt: pa.ListScalar, responses: pa.ListScalar) -> Example:
    prompt_ids = prompt.values.to_numpy()
    if not len(responses):  # a prompt that a rollout answers
        return Example(origin.as_py(), (Sequence(np.array(prompt_ids), len(prompt_ids)),))
    sequences = (
        Sequence(np.concatenate([prompt_ids, response.values.to_numpy()]), len(prompt_ids)) for response in responses
    )
    return Example(origin.as_py(), tuple(sequences))
