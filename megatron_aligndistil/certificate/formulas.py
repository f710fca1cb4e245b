"""Statistics of next-token distributions from whole logits, straight from the definitions, in the logits' own type.

Independent of the kernels: plain autograd. Shapes: T tokens, V true vocabulary entries.
"""

from __future__ import annotations

from torch import Tensor


def label_logprob(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """log π(label), nats, [T]."""
    return logits_TV.log_softmax(-1).gather(1, labels_T[:, None]).squeeze(1)


def entropy(logits_TV: Tensor) -> Tensor:
    """-Σ π log π, nats, [T]."""
    logprob_TV = logits_TV.log_softmax(-1)
    return -(logprob_TV.exp() * logprob_TV).sum(-1)


def kl(logits_TV: Tensor, other_TV: Tensor) -> Tensor:
    """KL(π ‖ π'), nats, [T]."""
    logprob_TV = logits_TV.log_softmax(-1)
    return (logprob_TV.exp() * (logprob_TV - other_TV.log_softmax(-1))).sum(-1)


def total_variation(logits_TV: Tensor, other_TV: Tensor) -> Tensor:
    """½ Σ |π - π'|, [T]."""
    return 0.5 * (logits_TV.softmax(-1) - other_TV.softmax(-1)).abs().sum(-1)


def token_alpha(adaptive: bool, alpha: float, epsilon: float, tvd_scale: float, tvd_T: Tensor) -> Tensor:
    """Eq. 16: α_t = α · scale · TVD_t + ε, or α for every token: [T]."""
    return alpha * tvd_scale * tvd_T + epsilon if adaptive else tvd_T.new_full(tvd_T.shape, alpha)


def extrapolated(base_TV: Tensor, toward_TV: Tensor, away_TV: Tensor, alpha_T: Tensor) -> Tensor:
    """z* = base + α_t (toward - away) (Eq. 11, 17): [T, V]."""
    return base_TV + alpha_T[:, None] * (toward_TV - away_TV)


def log_z_star(logits_d_TV: Tensor, logits_r_TV: Tensor, alpha_T: Tensor) -> Tensor:
    """log Σ exp(log π_d + α (log π_d - log π_r)), [T]."""
    d_TV, r_TV = logits_d_TV.log_softmax(-1), logits_r_TV.log_softmax(-1)
    return extrapolated(d_TV, d_TV, r_TV, alpha_T).logsumexp(-1)


def expected_gap(logits_TV: Tensor, logits_d_TV: Tensor, logits_r_TV: Tensor) -> Tensor:
    """E_π[log π_d - log π_r], nats, [T]."""
    gap_TV = logits_d_TV.log_softmax(-1) - logits_r_TV.log_softmax(-1)
    return (logits_TV.softmax(-1) * gap_TV).sum(-1)
