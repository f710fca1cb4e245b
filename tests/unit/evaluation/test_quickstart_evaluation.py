"""Rewards, divergences and answers of exported models against plain loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_aligndistil.data.chat import render_prompt
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.evaluation import contrastive
from megatron_aligndistil.evaluation.contrastive import Predictions, predict, token_means
from megatron_aligndistil.evaluation.generate import greedy_answers, pad_left
from megatron_aligndistil.launch.quickstart_pairs import train_pairs
from megatron_aligndistil.launch.quickstart_tiny import train_tokenizer
from megatron_aligndistil.types import Message, Sequence

VOCABULARY = 61
LENGTHS = ((3, 9), (1, 4), (5, 6))  # prompt, whole


def _model(seed: int, vocabulary: int = VOCABULARY) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sequences() -> list[Sequence]:
    rng = np.random.default_rng(3)
    return [Sequence(rng.integers(0, VOCABULARY, whole, dtype=np.int32), prompt) for prompt, whole in LENGTHS]


@pytest.fixture(scope="module")
def models() -> dict[str, Qwen2ForCausalLM]:
    return {name: _model(seed) for seed, name in enumerate(("initial", "dpo", "reverse_dpo", "aligndistil"))}


def _reference(models: dict[str, Qwen2ForCausalLM], sequences: list[Sequence], policy: str) -> tuple[float, float]:
    reward = divergence = 0.0
    count = 0
    with torch.no_grad():
        for row in sequences:
            tokens = torch.as_tensor(row.tokens, dtype=torch.int64)[None]
            log = {name: model(input_ids=tokens).logits[0].double().log_softmax(-1) for name, model in models.items()}
            for position in range(row.prompt_length - 1, row.length - 1):
                count += 1
                for v in range(VOCABULARY):
                    p = float(log[policy][position, v].exp())
                    reward += 0.1 * p * float(log["dpo"][position, v] - log["reverse_dpo"][position, v])
                    divergence += p * float(log[policy][position, v] - log["initial"][position, v])
    return reward / count, divergence / count


@pytest.mark.parametrize("policy", ["initial", "dpo", "aligndistil"])
def test_token_means_equal_plain_loops(
    models: dict[str, Qwen2ForCausalLM],
    sequences: list[Sequence],
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contrastive, "CHUNK_TOKENS", 4)  # 10 tokens: the last chunk is short
    predictions = {name: predict(model, sequences, batch_size=2) for name, model in models.items()}
    means = token_means(predictions, policy, beta0=0.1)
    reward, divergence = _reference(models, sequences, policy)
    assert means.tokens == 10
    assert means.expected_reward == pytest.approx(reward, rel=1e-4)
    assert means.kl_to_initial == pytest.approx(divergence, rel=1e-4, abs=1e-12)
    assert (means.kl_to_initial == 0.0) == (policy == "initial")


def test_models_of_other_vocabularies_are_refused(sequences: list[Sequence]) -> None:
    names = ("initial", "dpo", "reverse_dpo")
    predictions = {name: predict(_model(0, 61 + (name == "dpo")), sequences, 2) for name in names}
    with pytest.raises(DataError, match="initial 61, dpo 62, reverse_dpo 61"):
        token_means(predictions, "dpo", 0.1)


def test_no_tokens_are_refused() -> None:
    nothing = Predictions(torch.zeros(0, 4), torch.zeros(8, 4))
    with pytest.raises(DataError, match=r"predict \[0\] tokens"):
        token_means(dict.fromkeys(("initial", "dpo", "reverse_dpo"), nothing), "dpo", 0.1)


def test_padding_is_to_the_left() -> None:
    tokens_BS, mask_BS = pad_left([[5, 6, 7], [8]], pad=1)
    assert tokens_BS.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert mask_BS.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(
        [text for pair in train_pairs(40, seed=0) for text in (pair.question, pair.chosen, pair.rejected)]
    )


def test_answers_are_the_most_likely_tokens_whatever_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    model = _model(11, len(tokenizer))
    model.generation_config.repetition_penalty = 5.0  # a folder's own settings must not be applied
    model.generation_config.do_sample = True
    questions = ("How do I swim faster?", "What is a good way to brew a good cup of tea and keep it warm?", "Why?")
    prompts: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    expected = []
    for prompt in prompts:
        ids = render_prompt(tokenizer, prompt)
        start = len(ids)
        while len(ids) - start < 12 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    for batch_size in (1, 2, 3):
        assert greedy_answers(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == expected
    assert len(set(expected)) > 1
    assert model.generation_config.repetition_penalty == 5.0
