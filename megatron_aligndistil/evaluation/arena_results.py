"""Arena-Hard's figures of one pool of models: win rates, and win rates under style control with what fixed them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_aligndistil.config.evaluation_schema import ArenaHardEvaluationConfig
from megatron_aligndistil.evaluation.arena_hard import (
    FEATURES,
    GAMES,
    Game,
    Length,
    Match,
    points,
    style_difference,
    style_of,
)
from megatron_aligndistil.evaluation.bradley_terry import StyleFit, style_controlled, win_rates
from megatron_aligndistil.evaluation.content_cache import key_of
from megatron_aligndistil.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Played:
    """A model's matches and their games."""

    matches: Sequence[Match]
    games: Sequence[tuple[Game, Game]]


@dataclass(frozen=True)
class ModelFigures:
    """A model against the baseline, per cent.

    unreadable  games without a verdict, skipped ones included
    battles     readable games, a strong win as often as its weight says
    length      mean of its answers
    """

    win_rate: Estimate
    style_controlled: Estimate
    games: int
    unreadable: int
    skipped: int
    asked_again: int
    battles: float
    length: float


@dataclass(frozen=True)
class Figures:
    """All models; ``pool`` is what centred the style-controlled figures, None where style isn't controlled."""

    models: Mapping[str, ModelFigures]
    unit: str
    pool: Mapping[str, object] | None


def figures(config: ArenaHardEvaluationConfig, played: Mapping[str, Played], length: Length) -> Figures:
    """The figures of the models of one run, which are one pool."""
    counted = np.array(
        [[points(games, config.benchmark.strong_weight) for games in own.games] for own in played.values()]
    )
    won_MN, weights_MN = counted[..., 0], counted[..., 1]
    samples, seed = config.bootstrap_samples, config.seed
    rates = win_rates(won_MN, weights_MN, samples, seed)
    styles = [
        [(style_of(match.answer, length), style_of(match.baseline, length)) for match in own.matches]
        for own in played.values()
    ]
    pool, controlled = None, [Estimate(math.nan, math.nan, math.nan)] * len(rates)
    if config.benchmark.style_control:
        features = np.array([[style_difference(*both) for both in own] for own in styles])
        fit = style_controlled(won_MN, weights_MN, features, samples, seed)
        controlled = fit.win_rates
        names = [config.benchmark.baseline, *played]
        battles = [won_MN.tolist(), weights_MN.tolist(), features.tolist()]
        pool = _pool(names, fit, length.unit, key_of({"models": names, "battles": battles}), float(weights_MN.sum()))
    models = {}
    for i, (name, own) in enumerate(played.items()):
        games = [game for both in own.games for game in both]
        models[name] = ModelFigures(
            win_rate=_per_cent(rates[i]),
            style_controlled=_per_cent(controlled[i]),
            games=GAMES * len(own.games),
            unreadable=sum(game.label is None for game in games),
            skipped=sum(game.said is None for game in games),
            asked_again=sum(game.asked_again for game in games),
            battles=float(weights_MN[i].sum()),
            length=float(np.mean([style[0] for style, _ in styles[i]])),
        )
    return Figures(models, length.unit, pool)


def _pool(names: Sequence[str], fit: StyleFit, unit: str, id_: str, battles: float) -> dict[str, object]:
    return {
        "pool": id_,
        "models": list(names),
        "battles": battles,
        "length_unit": unit,
        "features": {
            name: {"mean": mean, "standard_deviation": deviation, "coefficient": coefficient}
            for name, mean, deviation, coefficient in zip(
                FEATURES,
                fit.means_K.tolist(),
                fit.deviations_K.tolist(),
                fit.coefficients_K.tolist(),
                strict=True,
            )
        },
    }


def _per_cent(own: Estimate) -> Estimate:
    return Estimate(100.0 * own.value, 100.0 * own.low, 100.0 * own.high)
