"""Dense float64 KL divergence, straight from the definition."""

from __future__ import annotations

from torch import Tensor


def dense_token_kl(
    policy_hidden_TH: Tensor,
    policy_weight_VH: Tensor,
    other_hidden_TH: Tensor,
    other_weight_VH: Tensor,
    vocab_size: int,
    from_other: bool = False,
) -> Tensor:
    """KL(pi_theta || pi_other), or of the two exchanged, [T] float64, differentiable; whole padded heads."""
    policy_TV = (policy_hidden_TH.double() @ policy_weight_VH[:vocab_size].double().t()).log_softmax(-1)
    other_TV = (other_hidden_TH.double() @ other_weight_VH[:vocab_size].double().t()).log_softmax(-1)
    if from_other:
        return (other_TV.exp() * (other_TV - policy_TV)).sum(-1)
    return (policy_TV.exp() * (policy_TV - other_TV)).sum(-1)
