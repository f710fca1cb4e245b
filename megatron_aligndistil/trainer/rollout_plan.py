"""How many prompts, responses and steps a rollout has; and the current rollout, as it is saved and restored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_aligndistil.config.json_text import parse_json
from megatron_aligndistil.config.rollout_schema import RolloutConfig
from megatron_aligndistil.config.rollout_sizes import RolloutSizes
from megatron_aligndistil.rollout.engine import Sampling
from megatron_aligndistil.trainer.source import SourceState
from megatron_aligndistil.types import Example
from megatron_aligndistil.types import Sequence as TokenSequence

_TOKENS, _LENGTHS, _PROMPTS, _VALUES = "tokens", "lengths", "prompt_lengths", "values."


@dataclass(frozen=True)
class RolloutPlan:
    """A run's rollouts. ``seed`` decides every draw."""

    sizes: RolloutSizes
    sampling: Sampling
    seed: int
    probe_prompts: int
    max_logprob_gap: float

    @classmethod
    def of(cls, config: RolloutConfig, sizes: RolloutSizes, stop_token_ids: Sequence[int], seed: int) -> RolloutPlan:
        """As the configuration says; responses end at ``stop_token_ids``."""
        sampling = Sampling(
            config.max_new_tokens, config.temperature, config.top_p, config.top_k, tuple(stop_token_ids)
        )
        own_seed = seed if config.seed is None else config.seed
        return cls(sizes, sampling, own_seed, config.probe_prompts, config.max_logprob_gap)

    def line(self) -> str:
        """For the log, and what a resumed run must have in common with the first."""
        sampling = self.sampling
        return (
            f"{self.sizes}; at most {sampling.max_new_tokens} new tokens, temperature {sampling.temperature:g}, "
            f"top-p {sampling.top_p:g}, top-k {sampling.top_k}, seed {self.seed}"
        )


@dataclass
class CurrentRollout:
    """Number ``phase``'s examples, with what has been computed of them.

    weights_step  optimizer steps done when the engines got the weights that drew them
    state         what the next rollout's assembly takes
    """

    phase: int = -1
    weights_step: int = -1
    examples: list[Example] = field(default_factory=list)
    state: Mapping[str, float] = field(default_factory=dict)

    def saved(self, unfinished: bool) -> SourceState:
        """As arrays and text; without examples where no step is left to train on them."""
        examples = self.examples if unfinished else []
        metadata = {
            "phase": self.phase,
            "weights_step": self.weights_step,
            "state": dict(self.state),
            "origins": [example.origin for example in examples],
        }
        return SourceState(_arrays(examples), json.dumps(metadata))

    @classmethod
    def restored(cls, saved: SourceState) -> CurrentRollout:
        """What ``saved`` has written.

        Raises:
            ValueError: it was not written by ``saved``. So do KeyError, TypeError and AttributeError say.
        """
        metadata = parse_json(saved.text)
        examples = _examples(saved.arrays, [str(origin) for origin in metadata["origins"]])
        state = {str(name): float(value) for name, value in metadata["state"].items()}
        return cls(int(metadata["phase"]), int(metadata["weights_step"]), examples, state)


def _arrays(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    if not examples:
        return {_TOKENS: np.zeros(0, np.int32)}
    sequences = [example.sequences[0] for example in examples]
    values = {
        f"{_VALUES}{name}": np.concatenate([example.values[name] for example in examples])
        for name in examples[0].values
    }
    return {
        _TOKENS: np.concatenate([sequence.tokens for sequence in sequences]),
        _LENGTHS: np.array([sequence.length for sequence in sequences], np.int64),
        _PROMPTS: np.array([sequence.prompt_length for sequence in sequences], np.int64),
        **values,
    }


def _examples(arrays: Mapping[str, np.ndarray], origins: Sequence[str]) -> list[Example]:
    if not origins:
        return []
    lengths, prompts = arrays[_LENGTHS], arrays[_PROMPTS]
    names = [name for name in arrays if name.startswith(_VALUES)]
    if not len(origins) == len(lengths) == len(prompts) or not ((prompts > 0) & (prompts < lengths)).all():
        raise ValueError("its lengths do not fit each other")
    for name, sizes in {_TOKENS: lengths, **dict.fromkeys(names, lengths - prompts)}.items():
        if arrays[name].shape != (sizes.sum(),):
            raise ValueError(f"{name} does not fit the lengths")
    tokens = np.split(arrays[_TOKENS], np.cumsum(lengths)[:-1])
    pieces = {name: np.split(arrays[name], np.cumsum(lengths - prompts)[:-1]) for name in names}
    return [
        Example(
            origin,
            (TokenSequence(tokens[i], int(prompts[i])),),
            {name.removeprefix(_VALUES): piece[i] for name, piece in pieces.items()},
        )
        for i, origin in enumerate(origins)
    ]
