"""One AlignDistil training step, as both sides of the step's benchmark are given it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

BETA0, LEARNING_RATE, BETAS, ADAM_EPS, CLIP = 0.1, 1e-6, (0.9, 0.95), 1e-8, 1.0
TEACHER_NOISE = 0.05  # of the teachers' weights, relative to each tensor's standard deviation

# SmolLM2-135M's architecture.
ARCHITECTURE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class StepProblem:
    """A global batch of one step.

    models       Hugging Face folders of the policy, the DPO model and the reverse DPO model
    rows         sequences of the batch, ``length`` tokens each, of which the first ``prompt`` are the prompt
    micro_batch  rows that go through a model at once
    bf16         products in bf16 with fp32 main weights; otherwise all in fp32
    recompute    whose layers' activations are recomputed in the backward pass: none, ours, both
    """

    models: tuple[str, str, str]
    rows: int
    length: int
    prompt: int
    micro_batch: int
    bf16: bool
    recompute: str

    def tokens(self, vocab_size: int) -> np.ndarray:
        """Token ids [rows, length], int32."""
        return np.random.default_rng(0).integers(0, vocab_size, (self.rows, self.length), dtype=np.int32)

    @property
    def response_share(self) -> float:
        """The share of tokens that are a response's."""
        return 1 - self.prompt / self.length


@dataclass(frozen=True)
class StepReply:
    """What a step came to; fields that don't apply are None.

    resident_bytes  of the process before the step: libraries, weights, optimizer state
    peak_bytes      of the process at the step's highest moment
    """

    seconds: float | None = None
    loss: float | None = None
    resident_bytes: int | None = None
    peak_bytes: int | None = None


def make_models(folder: Path, policy: str | None, teachers: Sequence[str]) -> tuple[str, str, str]:
    """The three folders: those given, others made under ``folder``.

    A policy that isn't given is random, in SmolLM2-135M's architecture; teachers that aren't given are the policy with
    noise in every weight. Like published models they hold numbers that bf16 holds too: in bf16 Megatron-Core's main
    weights start from the rounded ones, a plain fp32 copy doesn't.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    if policy is None:
        torch.manual_seed(0)
        _save(LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)), folder / "policy")
        policy = str(folder / "policy")
    if teachers:
        dpo, reverse_dpo = teachers
        return policy, dpo, reverse_dpo
    for name in ("dpo", "reverse_dpo"):
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            for weight in model.parameters():
                spread = float(weight.std()) if weight.numel() > 1 else 0.0
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=TEACHER_NOISE * spread)
        _save(model, folder / name)
    return policy, str(folder / "dpo"), str(folder / "reverse_dpo")


def _save(model: Any, folder: Path) -> None:
    model.to(torch.bfloat16).float().save_pretrained(folder)
