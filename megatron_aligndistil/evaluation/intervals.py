"""95 % confidence intervals of shares and means.

Shapes: N observations, R bootstrap samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # the standard normal's 97.5 % quantile
LOW, HIGH = 0.025, 0.975
DRAWS_AT_ONCE = 1 << 22  # resampled indices that exist at a time


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; the interval is NaN where there are too few observations for one."""

    value: float
    low: float
    high: float


def wilson(successes: float, count: int) -> Estimate:
    """The share ``successes`` / ``count`` with Wilson's score interval.

    ``successes`` may be fractional, since a tie counts as half a success. NaN where ``count`` is 0.
    """
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan)
    share, z2 = successes / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(values_N: np.ndarray, samples: int, seed: int) -> Estimate:
    """The mean with the percentile interval of ``samples`` bootstrap means; the same seed gives the same interval.

    Of paired observations give the differences: a pair is then resampled as a whole. NaN where there is no observation,
    and without an interval where there is one.
    """
    values = np.asarray(values_N, dtype=np.float64)
    if values.size == 0:
        return Estimate(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if values.size == 1:
        return Estimate(mean, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means_R = np.empty(samples)
    step = max(1, DRAWS_AT_ONCE // values.size)
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        means_R[start:stop] = values[generator.integers(values.size, size=(stop - start, values.size))].mean(axis=1)
    low, high = np.quantile(means_R, (LOW, HIGH))
    return Estimate(mean, float(low), float(high))
