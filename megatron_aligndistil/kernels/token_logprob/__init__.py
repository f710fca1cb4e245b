"""Log-probabilities of given tokens."""

from megatron_aligndistil.kernels.token_logprob.dispatch import token_logprob

__all__ = ["token_logprob"]
