"""Bradley–Terry fits of models against one baseline, without and with the style of answers as covariates.

Every battle has the baseline on one side, so that without covariates the maximum of the likelihood is known in closed
form: a model's win rate is the mean of its points, which is 0 or 1 where it loses or wins all. Resampling is over
questions: both games of a question, the copies of a strong win, and all models' answers to it stay together.

Shapes: M models, N questions, K style features, R bootstrap samples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_aligndistil.evaluation.intervals import DRAWS_AT_ONCE, HIGH, LOW, Estimate

_SCALE = math.log(10.0)  # of a model's column in the design, as upstream's: it matters since the penalty is on it
_BATTLES = 2.0  # how often each battle counts beside the penalty, as upstream, which writes a tie as a win and a loss
_GRADIENT, _STEPS = 1e-10, 100  # at which Newton's method has arrived, relative to the weights; and at most
_ROUNDING = 1e-12  # relative, of the function: at the end a step changes it by less


@dataclass(frozen=True)
class StyleFit:
    """Win rates with answers of equal style, and what the pool's features were standardised by."""

    win_rates: list[Estimate]
    coefficients_K: np.ndarray
    means_K: np.ndarray
    deviations_K: np.ndarray


def ratio(sums_N: np.ndarray, counts_N: np.ndarray, samples: int, seed: int) -> Estimate:
    """Σ sums / Σ counts with the percentile interval of ``samples`` resamplings of the N questions.

    NaN where nothing was counted, and without an interval where one question was.
    """
    sums, counts = np.asarray(sums_N, np.float64), np.asarray(counts_N, np.float64)
    if counts.sum() == 0:
        return Estimate(math.nan, math.nan, math.nan)
    drawn = (
        _quotient(sums[places].sum(axis=1), counts[places].sum(axis=1)) for places in _drawn(sums.size, samples, seed)
    )
    values_R = np.concatenate(list(drawn))
    return _estimate(float(sums.sum() / counts.sum()), values_R, int(np.count_nonzero(counts)))


def win_rates(points_MN: np.ndarray, weights_MN: np.ndarray, samples: int, seed: int) -> list[Estimate]:
    """Each model's Bradley–Terry win rate against the baseline, by maximum likelihood.

    points   won by a model on a question: its battles' weights, a tie's by half
    weights  of its readable battles
    """
    return [ratio(points, weights, samples, seed) for points, weights in zip(points_MN, weights_MN, strict=True)]


def style_controlled(
    points_MN: np.ndarray, weights_MN: np.ndarray, features_MNK: np.ndarray, samples: int, seed: int
) -> StyleFit:
    """Win rates where the difference in style is the pool's mean, by upstream's penalised likelihood.

    ``features``: the model's minus the baseline's. They are standardised over all battles of the pool. Coefficients
    have upstream's penalty of ½ their sum of squares, with which a fit of a model that loses all exists too.
    """
    battles = weights_MN.sum()
    models, questions = points_MN.shape
    if battles == 0:
        nothing = np.full(features_MNK.shape[-1], math.nan)
        return StyleFit([Estimate(math.nan, math.nan, math.nan)] * models, nothing, nothing, nothing)
    means = np.einsum("mn,mnk->k", weights_MN, features_MNK) / battles
    deviations = np.sqrt(np.einsum("mn,mnk->k", weights_MN, (features_MNK - means) ** 2) / battles)
    constant = deviations <= 1e-12
    scaled = np.where(constant, 0.0, (features_MNK - means) / np.where(constant, 1.0, deviations))
    design = np.zeros((models, questions, models + 1 + scaled.shape[-1]))
    design[:, :, 0] = -_SCALE  # the baseline
    design[np.arange(models), :, 1 + np.arange(models)] = _SCALE
    design[:, :, models + 1 :] = scaled
    fit = _fit(design, points_MN, weights_MN, np.zeros(design.shape[-1]))
    rates_RM = []
    for own, counts in _counted(questions, samples, seed):
        fought = weights_MN[:, own] * counts
        again = _rates(_fit(design[:, own], points_MN[:, own] * counts, fought, fit), models)
        # The penalty puts a model without a battle in the middle, of which nothing is known.
        rates_RM.append(np.where(fought.sum(axis=1) > 0, again, math.nan))
    judged = np.count_nonzero(weights_MN, axis=1)
    rates = _rates(fit, models)
    by_model = np.array(rates_RM).T
    estimates = [
        _estimate(float(rates[i]), by_model[i], int(judged[i])) if judged[i] else Estimate(*[math.nan] * 3)
        for i in range(models)
    ]
    return StyleFit(estimates, fit[models + 1 :], means, deviations)


def _rates(coefficients: np.ndarray, models: int) -> np.ndarray:
    return _logistic(_SCALE * (coefficients[1 : models + 1] - coefficients[0]))


def _fit(design: np.ndarray, points: np.ndarray, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Newton's method on a strictly convex function, with steps halved until they descend."""
    fought = weights > 0
    x, won, of = design[fought], _BATTLES * points[fought], _BATTLES * weights[fought]

    def value(at: np.ndarray) -> float:
        logits = x @ at
        return float(of @ np.logaddexp(0.0, logits) - won @ logits + 0.5 * at @ at)

    at, height = start, value(start)
    for _ in range(_STEPS):
        chances = _logistic(x @ at)
        gradient = x.T @ (of * chances - won) + at
        if np.abs(gradient).max() <= _GRADIENT * (1.0 + of.sum()):
            return at
        hessian = (x * (of * chances * (1.0 - chances))[:, None]).T @ x + np.eye(at.size)
        step = np.linalg.solve(hessian, gradient)
        length = 1.0
        while (below := value(at - length * step)) > height + _ROUNDING * (1.0 + abs(height)):
            length /= 2
        at, height = at - length * step, below
    raise RuntimeError(f"the fit of a strictly convex function did not converge in {_STEPS} steps")


def _logistic(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * values))


def _drawn(questions: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Resampled places, a few samples at a time."""
    generator = np.random.default_rng(seed)
    step = max(1, DRAWS_AT_ONCE // questions)
    for start in range(0, samples, step):
        yield generator.integers(questions, size=(min(step, samples - start), questions))


def _counted(questions: int, samples: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same resamplings: the places that are in one, and how often."""
    for chunk in _drawn(questions, samples, seed):
        for places in chunk:
            counts = np.bincount(places, minlength=questions)
            own = np.flatnonzero(counts)
            yield own, counts[own].astype(np.float64)


def _quotient(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """NaN where a resampling has nothing."""
    return np.divide(sums, counts, out=np.full(sums.shape, math.nan), where=counts > 0)


def _estimate(value: float, values_R: np.ndarray, observations: int) -> Estimate:
    if observations < 2 or np.isnan(values_R).all():
        return Estimate(value, math.nan, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = np.nanquantile(values_R, (LOW, HIGH))
    return Estimate(value, float(low), float(high))
