"""Several models' answers to the same prompts, compared (paper Table 3, 4): rewards, win rates, lengths.

Shapes: P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_aligndistil.evaluation.intervals import Estimate, bootstrap_mean


@dataclass(frozen=True)
class Answers:
    """A model's answers.

    lengths_P  tokens, the end token included; NaN where they aren't known
    scores_P   rewards; None where there is no reward
    """

    lengths_P: np.ndarray
    scores_P: np.ndarray | None = None


@dataclass(frozen=True)
class Verdicts:
    """A judge's verdicts on a model's answers against the baseline's.

    won_P       1, ½ or 0 of both orders' mean; NaN where neither could be read
    unreadable  verdicts, of two a prompt, that could not be read
    """

    won_P: np.ndarray
    unreadable: int


@dataclass(frozen=True)
class ModelRow:
    """One model of the table; None where it wasn't asked for, or is the baseline's comparison with itself.

    Win rates are over the baseline, a tie counting as half.
    """

    model: str
    length: Estimate
    reward: Estimate | None
    reward_win_rate: Estimate | None
    judge_win_rate: Estimate | None
    ties: int | None = None
    unreadable: int | None = None
    others: Mapping[str, Estimate] = field(default_factory=dict)


def wins(scores_P: np.ndarray, baseline_P: np.ndarray) -> np.ndarray:
    """1 where the score is above the baseline's, ½ where it is equal, else 0: [P]."""
    return (scores_P > baseline_P) + 0.5 * (scores_P == baseline_P)


def compare(
    answers: Mapping[str, Answers],
    baseline: str | None,
    verdicts: Mapping[str, Verdicts],
    samples: int,
    seed: int,
    others: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> list[ModelRow]:
    """The table's rows, in the order of ``answers``; intervals are bootstrapped over the prompts.

    baseline  whom win rates are over; None for no win rates
    others  column → model → further values a prompt [P], whose means are shown
    """

    def mean(values_P: np.ndarray) -> Estimate:
        return bootstrap_mean(values_P, samples, seed)

    rows = []
    for name, own in answers.items():
        reward = won = None
        ties = None
        if own.scores_P is not None:
            reward = mean(own.scores_P)
            base_P = None if baseline is None else answers[baseline].scores_P
            if name != baseline and base_P is not None:
                won_P = wins(own.scores_P, base_P)
                won, ties = mean(won_P), int((won_P == 0.5).sum())
        verdict = verdicts.get(name)
        judged = None if verdict is None else mean(verdict.won_P[~np.isnan(verdict.won_P)])
        further = {column: mean(values[name]) for column, values in (others or {}).items() if name in values}
        unreadable = None if verdict is None else verdict.unreadable
        length = mean(own.lengths_P[~np.isnan(own.lengths_P)])
        rows.append(ModelRow(name, length, reward, won, judged, ties, unreadable, further))
    return rows


def mean_of_orders(first: Sequence[float | None], second: Sequence[float | None]) -> Verdicts:
    """Both orders' verdicts a prompt, each 1, ½ or 0 for the model or None where it could not be read.

    A prompt of which one order can be read counts with that one; neither, and it is left out.
    """
    won = []
    for pair in zip(first, second, strict=True):
        known = [verdict for verdict in pair if verdict is not None]
        won.append(sum(known) / len(known) if known else np.nan)
    return Verdicts(np.asarray(won, np.float64), sum(verdict is None for verdict in (*first, *second)))
