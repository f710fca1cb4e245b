"""Answers of a Hugging Face model to prompts, for reading and for counting properties.

Shape legend: B prompts of a batch, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from megatron_aligndistil.data.chat import render_prompt, stop_token_ids
from megatron_aligndistil.types import Message


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The most likely continuation, token by token, of each prompt as training writes it; in the order of ``prompts``.

    An answer ends at the token that ended responses in training, or after ``max_new_tokens``; special tokens are left
    out of the text. Whatever the model's folder says about sampling or penalties is not applied.
    """
    stops = stop_token_ids(tokenizer)
    pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=pad),
    )
    answers: list[str] = []
    try:
        for start in range(0, len(prompts), batch_size):
            rendered = [render_prompt(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
            tokens_BS, mask_BS = pad_left(rendered, pad)
            out_BS = model.generate(input_ids=tokens_BS.to(model.device), attention_mask=mask_BS.to(model.device))
            new_BS = out_BS[:, tokens_BS.shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new_BS, skip_special_tokens=True)]
    finally:
        model.generation_config = own
    return answers


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, S] int64 that end at the same position, and the mask [B, S] int64 that is 0 on padding."""
    width = max(map(len, rows))
    tokens_BS = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask_BS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens_BS, mask_BS
