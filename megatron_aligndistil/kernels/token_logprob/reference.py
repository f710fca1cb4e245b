"""Dense float64 log-probabilities, straight from the definition."""

from __future__ import annotations

from torch import Tensor


def dense_token_logprob(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, vocab_size: int) -> Tensor:
    """log softmax(W h)[label], [T] float64, by autograd differentiable; ``weight_VH`` is the whole padded head."""
    logits_TV = hidden_TH.double() @ weight_VH[:vocab_size].double().t()
    return logits_TV.log_softmax(-1).gather(1, labels_T[:, None]).squeeze(1)
