"""KL divergence between the next-token distributions of two models."""

from megatron_aligndistil.kernels.token_kl.dispatch import token_kl

__all__ = ["token_kl"]
