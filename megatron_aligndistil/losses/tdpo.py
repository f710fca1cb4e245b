"""Token-level direct preference optimisation (Zeng et al. 2024, arXiv:2404.11999), averaged over pairs.

u = β log π_θ(y_w)/π_ref(y_w) - β log π_θ(y_l)/π_ref(y_l) is DPO's margin, and a response's sequential KL is
D(y) = Σ_t KL(π_ref(·|y_<t) ‖ π_θ(·|y_<t)). Both report DPO's rewards, so ``reward_margin`` is u, and beside them
``chosen_kl`` and ``rejected_kl``: D of the two responses, nats.
"""

from __future__ import annotations

from torch import Tensor

from megatron_aligndistil.losses.pairs import logistic_loss, margins, pair_output
from megatron_aligndistil.types import LossOutput


def tdpo1_loss(logprob_N: Tensor, reference_logprob_N: Tensor, kl_N: Tensor, beta: float) -> LossOutput:
    """-log σ(u - β (D(y_l) - D(y_w))) of P pairs, chosen and rejected in turn.

    Args:
        logprob_N: summed response log-probs under the policy [N].
        reference_logprob_N: the same under the reference [N].
        kl_N: D, nats [N]; it has a gradient, as the policy's log-probs have.
        beta: nats of reward for a nat of log-ratio.
    """
    reward_N = beta * (logprob_N - reference_logprob_N)
    return _output(margins(reward_N) + beta * margins(kl_N), reward_N, kl_N)


def tdpo2_loss(logprob_N: Tensor, reference_logprob_N: Tensor, kl_N: Tensor, beta: float, alpha: float) -> LossOutput:
    """-log σ(u - α (β D(y_l) - sg(β D(y_w)))) of P pairs, chosen and rejected in turn.

    Args:
        logprob_N: summed response log-probs under the policy [N].
        reference_logprob_N: the same under the reference [N].
        kl_N: D, nats [N]; the chosen responses' gets no gradient.
        beta: nats of reward for a nat of log-ratio.
        alpha: weight of the sequential KLs beside u.
    """
    reward_N = beta * (logprob_N - reference_logprob_N)
    kl_P2 = kl_N.view(-1, 2)
    return _output(margins(reward_N) - alpha * beta * (kl_P2[:, 1] - kl_P2[:, 0].detach()), reward_N, kl_N)


def _output(margin_P: Tensor, reward_N: Tensor, kl_N: Tensor) -> LossOutput:
    kl_P2 = kl_N.view(-1, 2)
    return pair_output(logistic_loss(margin_P), reward_N, chosen_kl=kl_P2[:, 0], rejected_kl=kl_P2[:, 1])
