"""How often a reward prefers the chosen response (paper Table 2), from numbers of whole responses.

Shapes: P pairs; the second axis of [P, 2] is (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from megatron_aligndistil.evaluation.intervals import Estimate, bootstrap_mean, wilson

# Reward → the models that it is made of, in the table's order.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "reward model": ("reward_model",),
    "DPO reward": ("dpo", "reference"),
    "contrastive reward": ("dpo", "reverse_dpo"),
}
PER_TOKEN = ", per token"


@dataclass(frozen=True)
class Accuracy:
    """A reward on a set of pairs: the share it orders as people did, a tie counted as half, and Wilson's interval."""

    reward: str
    share: Estimate
    ties: int
    pairs: int


@dataclass(frozen=True)
class Difference:
    """By how much the first reward's accuracy exceeds the second's on the same pairs."""

    first: str
    second: str
    value: Estimate


def rewards(
    statistics: Mapping[str, np.ndarray], lengths_P2: np.ndarray, beta0: float, per_token: bool
) -> dict[str, np.ndarray]:
    """Reward → its values [P, 2] in float64, of those whose models' ``statistics`` [P, 2] are all given.

    statistics  reward_model: r(x, y) (Eq. 1); the others: log π(y | x), nats
    lengths_P2  response tokens, by which the rewards "…, per token" are divided

    The DPO reward is β₀ log π_d/π_ref (Eq. 5), the contrastive one β₀ log π_d/π_r (Eq. 12).
    """
    found: dict[str, np.ndarray] = {}
    for name, needed in NEEDS.items():
        if any(model not in statistics for model in needed):
            continue
        first, *others = (np.asarray(statistics[model], np.float64) for model in needed)
        found[name] = beta0 * (first - others[0]) if others else first
    if per_token:
        found |= {f"{name}{PER_TOKEN}": values / lengths_P2 for name, values in found.items()}
    return found


def correct(rewards_P2: np.ndarray) -> np.ndarray:
    """1 where the chosen response has the higher reward, ½ where both have the same, else 0: [P]."""
    chosen, rejected = rewards_P2[:, 0], rewards_P2[:, 1]
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def accuracy(reward: str, rewards_P2: np.ndarray) -> Accuracy:
    """The accuracy of one reward, whose values are [P, 2]."""
    correct_P = correct(rewards_P2)
    return Accuracy(
        reward, wilson(float(correct_P.sum()), len(correct_P)), int((correct_P == 0.5).sum()), len(correct_P)
    )


def differences(values: Mapping[str, np.ndarray], samples: int, seed: int) -> list[Difference]:
    """Of every two rewards, the later one in the table's order first: a paired bootstrap over the pairs.

    A reward per token is compared with the others per token, and with itself over the whole response.
    """
    return [
        Difference(later, earlier, bootstrap_mean(correct(values[later]) - correct(values[earlier]), samples, seed))
        for earlier, later in combinations(values, 2)
        if later.endswith(PER_TOKEN) == earlier.endswith(PER_TOKEN) or later == f"{earlier}{PER_TOKEN}"
    ]
