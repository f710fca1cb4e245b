"""A judge against people's preferences: agreement, and its biases towards a place and a length.

Shapes: P pairs; columns of [P, 2] are the orders, the preferred response shown first and second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_aligndistil.evaluation.intervals import Estimate, bootstrap_mean


@dataclass(frozen=True)
class Agreement:
    """Shares with 95 % intervals; a tie counts as half. NaN where nothing was readable.

    agreement          with people's preference, both orders' mean
    agreement_longer   where people prefer the longer response
    agreement_shorter  where they prefer the shorter
    prefers_first      of all verdicts, those for the response shown first; ½ without position bias
    consistent         pairs whose two verdicts are the same response, or both ties
    prefers_longer     of all pairs of unequal length, the longer response's share; beside it people's own
    people_prefer_longer
    length_bias        prefers_longer − people_prefer_longer, on the same pairs
    pairs, unreadable  pairs with a readable verdict; verdicts, of two a pair, that weren't
    """

    agreement: Estimate
    agreement_longer: Estimate
    agreement_shorter: Estimate
    prefers_first: Estimate
    consistent: Estimate
    prefers_longer: Estimate
    people_prefer_longer: Estimate
    length_bias: Estimate
    pairs: int
    unreadable: int


def agreement(verdicts_P2: np.ndarray, longer_P: np.ndarray, samples: int, seed: int) -> Agreement:
    """The figures; intervals are bootstrapped over the pairs.

    verdicts_P2  1 for the response that people prefer, ½, 0; NaN where the verdict could not be read
    longer_P     length of the preferred response minus the other's, in any unit
    """

    def mean(values_N: np.ndarray) -> Estimate:
        return bootstrap_mean(values_N[~np.isnan(values_N)], samples, seed)

    readable_P2 = ~np.isnan(verdicts_P2)
    known_P = readable_P2.any(axis=1)
    agree_P = np.full(len(verdicts_P2), np.nan)
    agree_P[known_P] = np.nanmean(verdicts_P2[known_P], axis=1)
    first_P = np.full(len(verdicts_P2), np.nan)
    both_P = readable_P2.all(axis=1)
    # Over both orders, so that neither response is more often first.
    first_P[both_P] = (verdicts_P2[both_P, 0] + 1.0 - verdicts_P2[both_P, 1]) / 2
    same_P = np.where(both_P, verdicts_P2[:, 0] == verdicts_P2[:, 1], np.nan)
    unequal_P = known_P & (longer_P != 0)
    people_P = (longer_P[unequal_P] > 0).astype(np.float64)
    judge_P = np.where(longer_P[unequal_P] > 0, agree_P[unequal_P], 1.0 - agree_P[unequal_P])
    return Agreement(
        agreement=mean(agree_P),
        agreement_longer=mean(agree_P[longer_P > 0]),
        agreement_shorter=mean(agree_P[longer_P < 0]),
        prefers_first=mean(first_P),
        consistent=mean(same_P),
        prefers_longer=mean(judge_P),
        people_prefer_longer=mean(people_P),
        length_bias=mean(judge_P - people_P),
        pairs=int(known_P.sum()),
        unreadable=int((~readable_P2).sum()),
    )
