"""Token-level alignment of language models by adaptive policy distillation, on Megatron-Core."""

__version__ = "0.1.0"
