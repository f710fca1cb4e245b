"""The checks of what learns from given preferences: pairs of responses, or single ones with a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_aligndistil.certificate import dense_model as dense
from megatron_aligndistil.certificate import dense_preferences
from megatron_aligndistil.certificate.algorithm_check import AlgorithmCheck, pairs, responses_of
from megatron_aligndistil.certificate.dense_kto import KTO, kto
from megatron_aligndistil.certificate.models import World
from megatron_aligndistil.types import Example


def _pairs(world: World, swapped: bool = False) -> dense_preferences.Pairs:
    return [(b, a) if swapped else (a, b) for a, b in responses_of(world.pairs)]


def _dpo(algorithm: str, swapped: bool, smoothing: float) -> AlgorithmCheck:
    beta = 0.3

    def loss(weights: dense.Weights, world: World) -> Tensor:
        reference, given = world.weights("initial"), _pairs(world, swapped)
        return dense_preferences.dpo(weights, reference, world.shape, given, beta, smoothing)

    settings = {"dpo.beta": beta, "dpo.label_smoothing": smoothing, "dpo.reference_path": "initial"}
    return AlgorithmCheck(algorithm, words=3 + 3, loss=loss, examples=pairs, settings=settings)  # policy, reference


def _against_reference(
    algorithm: str, section: str, dense_loss: Callable[..., Tensor], words: int, **how: Any
) -> AlgorithmCheck:
    def loss(weights: dense.Weights, world: World) -> Tensor:
        return dense_loss(weights, world.weights("initial"), world.shape, _pairs(world), **how)

    settings = {f"{section}.{key}": value for key, value in how.items()} | {f"{section}.reference_path": "initial"}
    return AlgorithmCheck(algorithm, words=words, loss=loss, examples=pairs, settings=settings)


def _simpo() -> AlgorithmCheck:
    how = {"beta": 2.0, "gamma": 0.7}

    def loss(weights: dense.Weights, world: World) -> Tensor:
        return dense_preferences.simpo(weights, world.shape, _pairs(world), **how)

    settings = {f"simpo.{key}": value for key, value in how.items()}
    return AlgorithmCheck("simpo", words=3, loss=loss, examples=pairs, settings=settings)


def _labelled(world: World) -> list[Example]:
    return [replace(example, desirable=i % 3 != 1) for i, example in enumerate(world.singles)]


def _kto(trained: str, reference: str) -> AlgorithmCheck:
    how = KTO(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)

    def loss(weights: dense.Weights, world: World) -> Tensor:
        examples = _labelled(world)
        labelled = [(r, bool(e.desirable)) for e, (r,) in zip(examples, responses_of(examples), strict=True)]
        return kto(weights, world.weights(reference), world.shape, labelled, how)

    settings = {f"kto.{key}": value for key, value in vars(how).items()} | {"kto.reference_path": reference}
    return AlgorithmCheck("kto", words=3 + 3, loss=loss, examples=_labelled, settings=settings, trained=trained)


# The policy's log-probs, the reference's, and the KL between the two.
_TDPO_WORDS = 3 + 3 + 5

PREFERENCE_CHECKS: Mapping[str, AlgorithmCheck] = {
    "dpo": _dpo("dpo", swapped=False, smoothing=0.0),
    "reverse_dpo": _dpo("reverse_dpo", swapped=True, smoothing=0.1),
    "cdpo": _dpo("cdpo", swapped=False, smoothing=0.1),
    "tdpo1": _against_reference("tdpo1", "tdpo", dense_preferences.tdpo, _TDPO_WORDS, beta=0.1),
    "tdpo2": _against_reference("tdpo2", "tdpo", dense_preferences.tdpo, _TDPO_WORDS, beta=0.1, alpha=0.5),
    "simpo": _simpo(),
    "ipo": _against_reference("ipo", "ipo", dense_preferences.ipo, 3 + 3, beta=0.2, normalize_by_length=True),
    "ipo of whole responses": _against_reference(
        "ipo", "ipo", dense_preferences.ipo, 3 + 3, beta=0.2, normalize_by_length=False
    ),
    # The KL of one is minus the other's, whatever the layout's models: one of the two is cut at 0.
    "kto": _kto("policy", "initial"),
    "kto exchanged": _kto("initial", "policy"),
}
