"""From a rollout's scores, log-probs and values to what PPO trains on: NumPy, float64, one response at a time.

Shape legend: T tokens of a response. Rewards, values and advantages are in units of reward.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WHITENING_EPSILON = 1e-8
KL_ERROR_LIMIT = 0.2


def token_rewards(score: float, token_bonus_T: np.ndarray | None, kl_T: np.ndarray, kl_coef: float) -> np.ndarray:
    """-kl_coef · kl_t + bonus_t, and the score on top at the last token: [T], T ≥ 1.

    Ziegler et al. 2019 (arXiv:1909.08593, Eq. 2), token by token as in Ouyang et al. 2022; RTO's bonus is
    β₁ log π_d/π_ref (Zhong et al. 2024).

    Args:
        score: the whole response's reward.
        token_bonus_T: further rewards of the tokens [T].
        kl_T: log π_old(y_t) - log π_ref(y_t), nats [T].
        kl_coef: units of reward a nat.
    """
    rewards_T = -kl_coef * kl_T.astype(np.float64)
    if token_bonus_T is not None:
        rewards_T += token_bonus_T
    rewards_T[-1] += score
    return rewards_T


def gae(
    rewards_T: np.ndarray, values_T: np.ndarray, discount: float, gae_lambda: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantages and the returns that the values should be: ([T], [T]).

    A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t (Schulman et al. 2016, arXiv:1506.02438, Eq. 16), and
    returns A + V. A response ends, so the value after its last token is 0.

    Args:
        rewards_T: r [T].
        values_T: V before each token is chosen [T].
        discount: γ.
        gae_lambda: λ.
    """
    following_T = np.append(values_T[1:], 0.0)[: len(values_T)]
    deltas_T = rewards_T + discount * following_T - values_T
    advantages_T = np.empty(len(deltas_T), np.float64)
    advantage = 0.0
    for t in reversed(range(len(deltas_T))):
        advantage = deltas_T[t] + discount * gae_lambda * advantage
        advantages_T[t] = advantage
    return advantages_T, advantages_T + values_T


def whitened(advantages: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The responses' advantages [T] each, shifted and scaled to mean 0 and deviation 1 over all tokens of the rollout.

    (A - mean) / √(var + 1e-8), var unbiased, as in TRL's masked_whiten; OpenRLHF's differs by the biased variance.
    A rollout of one token has no deviation: its advantage becomes 0.
    """
    tokens = np.concatenate([np.empty(0), *advantages])
    if not tokens.size:
        return list(advantages)
    variance = tokens.var(ddof=1) if tokens.size > 1 else 0.0
    return [(advantages_T - tokens.mean()) / np.sqrt(variance + WHITENING_EPSILON) for advantages_T in advantages]


def adapted_kl_coef(coef: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """The next rollout's KL coefficient: coef · (1 + clip(kl / target - 1, ± 0.2) · responses / horizon).

    The proportional controller of Ziegler et al. 2019 (arXiv:1909.08593, section 2.2). It stays positive where a
    rollout has fewer than 5 · horizon responses.

    Args:
        coef: this rollout's coefficient, units of reward a nat.
        kl: what the rollout measured, nats a token.
        target: what it should be, nats a token.
        responses: of this rollout.
        horizon: responses over which the coefficient adapts.
    """
    error = float(np.clip(kl / target - 1, -KL_ERROR_LIMIT, KL_ERROR_LIMIT))
    return coef * (1 + error * responses / horizon)
