"""The model families: a Hugging Face config → an ``Architecture``, and the names of the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_aligndistil.errors import CheckpointError, reason
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families import llama, qwen2, qwen3
from megatron_aligndistil.models.families.common import check_sizes, place_of, refuse
from megatron_aligndistil.models.families.table import Table


@dataclass(frozen=True)
class Family:
    """``architecture`` reads a transformers config; ``table`` names the tensors."""

    architecture: Callable[[Any], Architecture]
    table: Table


FAMILIES = {
    "llama": Family(llama.architecture, llama.TABLE),
    "qwen2": Family(qwen2.architecture, qwen2.TABLE),
    "qwen3": Family(qwen3.architecture, qwen3.TABLE),
}


def family_named(model_type: object, origin: object) -> Family:
    """The family of a ``model_type``; ``origin`` is the file or folder that an error message names.

    Raises:
        CheckpointError: ``model_type`` is none of ours.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(f"{origin}: model_type={model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[str(model_type)]


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        CheckpointError: ``model_type`` is none of ours.
    """
    return family_named(config.model_type, place_of(config))


def is_classifier(architectures: Iterable[str] | None) -> bool:
    """Whether a config's ``architectures`` name one of transformers' sequence classifiers, as reward models are."""
    return any(str(name).endswith("ForSequenceClassification") for name in architectures or ())


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config; a sequence classifier of one label has a scalar head.

    Raises:
        CheckpointError: a family or a variant that isn't implemented, a classifier of several labels, or sizes that no
            model has.
    """
    family = family_of(config)
    try:
        architecture = family.architecture(config)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{place_of(config)}: an entry is of another type ({reason(error)})") from error
    check_sizes(config, architecture)
    if not is_classifier(config.architectures):
        return architecture
    if config.num_labels != 1:
        raise refuse(config, "num_labels", config.num_labels, "1 (a reward model's score)")
    return architecture.with_scalar_head()


def table_of(architecture: Architecture) -> Table:
    """The name table of an architecture's family."""
    return FAMILIES[architecture.family].table
