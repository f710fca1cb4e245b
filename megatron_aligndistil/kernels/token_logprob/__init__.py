"""Log-probabilities of given tokens, and entropies."""

from megatron_aligndistil.kernels.token_logprob.dispatch import token_logprob, token_logprob_and_entropy

__all__ = ["token_logprob", "token_logprob_and_entropy"]
