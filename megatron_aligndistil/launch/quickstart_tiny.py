"""A model small enough for tests, made on the spot: Qwen2's architecture with random weights and its own tokenizer.

Random weights have no language, so nothing could be aligned. It is therefore first taught, for some seconds and in this
process, the language of both kinds of answers: a base model in which the wanted property is there but rare.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_aligndistil.data.chat import ChatFormat
from megatron_aligndistil.launch.quickstart_pairs import Pair

EOS, PAD = "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 1024
PRETRAIN_STEPS = 150
PRETRAIN_BATCH = 4
PRETRAIN_LR = 4e-3
# The share of answers with the property among those that the language is learnt from. Chosen by trying: with a tenth,
# AlignDistil raised the reward but not the rate of the property in greedy answers.
WARM_SHARE = 0.2
IGNORED = -100  # transformers' label of a position without loss

logger = logging.getLogger(__name__)


def make_tiny_model(folder: Path, pairs: Sequence[Pair], seed: int) -> None:
    """Write a Hugging Face folder with the model, taught the answers of ``pairs``, and its tokenizer."""
    tokenizer = train_tokenizer([text for pair in pairs for text in (pair.question, pair.chosen, pair.rejected)])
    model = random_model(tokenizer, seed)
    loss = _teach_language(model, tokenizer, pairs, seed)
    logger.info("%.2f M parameters, cross-entropy %.2f nats a token", model.num_parameters() / 1e6, loss)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """About 1 M random weights in Qwen2's shape, for the vocabulary of ``tokenizer``."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def train_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocabulary`` entries learnt from ``texts``, with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, "user\nassistant\nsystem\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def _teach_language(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], seed: int
) -> float:
    """Cross-entropy training on the answers, mostly rejected ones. Returns the last loss in nats a token."""
    rng = random.Random(f"language {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_LR, total_steps=PRETRAIN_STEPS)
    chat = ChatFormat(tokenizer)
    loss = torch.zeros(())
    for _ in range(PRETRAIN_STEPS):
        tokens_BS, labels_BS = _batch(chat, rng.choices(pairs, k=PRETRAIN_BATCH), rng)
        loss = model(input_ids=tokens_BS, labels=labels_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _batch(chat: ChatFormat, pairs: Sequence[Pair], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids [B, S] and labels [B, S], the question included in both: it is language too."""
    texts = []
    for pair in pairs:
        answer = pair.chosen if rng.random() < WARM_SHARE else pair.rejected
        _, (text,) = chat.texts([{"role": "user", "content": pair.question}], [answer])
        texts.append(text.rstrip("\n"))
    rows = chat.token_ids(texts)
    width = max(map(len, rows))
    pad = chat.tokenizer.pad_token_id
    tokens_BS = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    labels_BS = torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows])
    return tokens_BS, labels_BS
