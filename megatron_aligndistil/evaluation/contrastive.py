"""The expected contrastive reward and the divergence from the initial model, from whole logits.

Dense and in one process: an account of exported models that shares no code with the kernels and the trainer.

Shape legend: B rows, S positions, T response tokens, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_aligndistil.errors import DataError
from megatron_aligndistil.types import Sequence as TokenSequence

CHUNK_TOKENS = 256  # tokens whose logits exist at once


@dataclass(frozen=True)
class Predictions:
    """What a model says about the response tokens of some sequences: hidden states [T, H] and its head [V, H]."""

    hidden_TH: Tensor
    head_VH: Tensor

    def log_probs(self, start: int, stop: int) -> Tensor:
        """log π of the tokens from ``start`` to ``stop``, [stop - start, V], in float64."""
        return torch.log_softmax((self.hidden_TH[start:stop] @ self.head_VH.T).double(), dim=-1)


@dataclass(frozen=True)
class TokenMeans:
    """Means over response tokens.

    ``expected_reward`` is β₀ E_{v~π}[log π_d(v) - log π_r(v)], ``kl_to_initial`` KL(π ‖ π_initial) in nats.
    """

    expected_reward: float
    kl_to_initial: float
    tokens: int


@torch.no_grad()
def predict(model: PreTrainedModel, sequences: Sequence[TokenSequence], batch_size: int) -> Predictions:
    """Run ``model`` over ``sequences`` and keep what predicts their response tokens, in their order."""
    kept: list[Tensor] = []
    for start in range(0, len(sequences), batch_size):
        rows = sequences[start : start + batch_size]
        width = max(row.length for row in rows)
        tokens_BS = torch.zeros(len(rows), width, dtype=torch.int64)
        for tokens_S, row in zip(tokens_BS, rows, strict=True):
            tokens_S[: row.length] = torch.as_tensor(row.tokens, dtype=torch.int64)
        # Right padding comes after every token that counts, so causal attention needs no mask.
        hidden_BSH = model.base_model(input_ids=tokens_BS.to(model.device)).last_hidden_state
        kept += [hidden[row.prompt_length - 1 : row.length - 1] for hidden, row in zip(hidden_BSH, rows, strict=True)]
    return Predictions(torch.cat(kept), model.get_output_embeddings().weight.detach())


@torch.no_grad()
def token_means(predictions: Mapping[str, Predictions], policy: str, beta0: float) -> TokenMeans:
    """Means of the model named ``policy`` over the same tokens as "dpo", "reverse_dpo" and "initial".

    Raises:
        DataError: the vocabularies differ, or there is no token.
    """
    _check(predictions)
    count = len(predictions[policy].hidden_TH)
    reward = divergence = 0.0
    for start in range(0, count, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, count)
        log_p = predictions[policy].log_probs(start, stop)
        p = log_p.exp()
        contrast = predictions["dpo"].log_probs(start, stop) - predictions["reverse_dpo"].log_probs(start, stop)
        reward += beta0 * float((p * contrast).sum())
        divergence += float((p * (log_p - predictions["initial"].log_probs(start, stop))).sum())
    return TokenMeans(reward / count, divergence / count, count)


def _check(predictions: Mapping[str, Predictions]) -> None:
    sizes = {name: model.head_VH.shape[0] for name, model in predictions.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"the models' vocabularies differ in size ({listed}); compare models of one tokenizer")
    counts = {len(model.hidden_TH) for model in predictions.values()}
    if counts == {0} or len(counts) > 1:
        raise DataError(f"the models predict {sorted(counts)} tokens; give all the same sequences, with responses")
