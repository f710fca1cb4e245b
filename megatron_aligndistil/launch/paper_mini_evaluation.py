"""What the miniature measures: sampled answers to held-out questions, their rewards, their divergence from SFT.

In one process and with transformers alone, on exported models in float32. Every method's k-th answer to a prompt is
drawn from the same random numbers.

Shape legend: M prompts, K answers a prompt, S positions, H hidden size, T response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from megatron_aligndistil.data.chat import render_prompt, stop_token_ids
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.evaluation.answers import wins
from megatron_aligndistil.evaluation.contrastive import CHUNK_TOKENS, Predictions, predict
from megatron_aligndistil.launch.paper_mini_task import (
    HELDOUT_TOPICS,
    MAX_NEW_TOKENS,
    SAMPLES,
    Grade,
    Prompt,
    grade,
    prompts,
)
from megatron_aligndistil.report.paper_mini import Figures
from megatron_aligndistil.rollout.engine import Request, Sampling, seed_of
from megatron_aligndistil.rollout.hf_engine import HFEngine
from megatron_aligndistil.types import Sequence as TokenSequence

BATCH = 64


@dataclass(frozen=True)
class Answers:
    """A model's answers: tokens with their prompt's, texts, grades, true rewards [M, K], in the order of the prompts.

    ended  whether they reached an end token within the room for them
    """

    sequences: Sequence[TokenSequence]
    texts: Sequence[str]
    grades: Sequence[Grade]
    ended: Sequence[bool]
    rewards_MK: np.ndarray

    @property
    def length(self) -> float:
        """Mean tokens of an answer, the end token included."""
        return float(np.mean([sequence.length - sequence.prompt_length for sequence in self.sequences]))

    def mean_of(self, part: str) -> float:
        """The mean of a part of the grades, such as "tips"."""
        return float(np.mean([getattr(found, part) for found in self.grades]))


@dataclass(frozen=True)
class Task:
    """The models of a seed: exported folders by name, "sft" among them, the reward model's, and the tokenizer's."""

    tokenizer: Path
    folders: Mapping[str, Path]
    reward_model: Path


@dataclass(frozen=True)
class Evaluation:
    """What all models are measured on: ``samples`` answers a prompt, of up to ``max_new_tokens``."""

    prompts: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    samples: int
    max_new_tokens: int

    def answers(self, model: PreTrainedModel) -> Answers:
        """Draw a model's answers at temperature 1."""
        engine = HFEngine(model.config, torch.device("cpu"), torch.float32, BATCH)
        engine.begin_update()
        engine.load(dict(model.named_parameters()))
        engine.end_update()
        requests = [
            Request(self._rendered(prompt), seed_of("paper mini", index, k))
            for index, prompt in enumerate(self.prompts)
            for k in range(self.samples)
        ]
        stops = tuple(stop_token_ids(self.tokenizer))
        drawn = engine.generate(requests, Sampling(self.max_new_tokens, 1.0, 1.0, 0, stops))
        texts = self.tokenizer.batch_decode([sample.tokens for sample in drawn], skip_special_tokens=True)
        topics = [prompt.topic for prompt in self.prompts for _ in range(self.samples)]
        grades = [grade(topic, text) for topic, text in zip(topics, texts, strict=True)]
        rewards = np.array([found.reward for found in grades])
        sequences = [
            TokenSequence(np.concatenate([request.prompt, sample.tokens]), len(request.prompt))
            for request, sample in zip(requests, drawn, strict=True)
        ]
        ended = [sample.finish_reason == "stop" for sample in drawn]
        return Answers(sequences, texts, grades, ended, rewards.reshape(len(self.prompts), self.samples))

    def _rendered(self, prompt: Prompt) -> np.ndarray:
        tokens = render_prompt(self.tokenizer, [{"role": "user", "content": prompt.question}])
        return np.asarray(tokens, dtype=np.int32)


@dataclass(frozen=True)
class Measured:
    """A model's answers and what they come to; see ``report.paper_mini.Figures``."""

    prompts: Sequence[Prompt]
    answers: Answers
    win_rate: float
    scores_MK: np.ndarray
    kl_to_sft: float

    def figures(self, seconds: float, seconds_before: float) -> Figures:
        """With the seconds of the trainings."""
        return Figures(
            true_reward=float(self.answers.rewards_MK.mean()),
            win_rate=self.win_rate,
            model_reward=float(self.scores_MK.mean()),
            kl_to_sft=self.kl_to_sft,
            length=self.answers.length,
            warm=self.answers.mean_of("warm"),
            tips=self.answers.mean_of("tips"),
            polite=self.answers.mean_of("polite"),
            others=self.answers.mean_of("others"),
            ended=float(np.mean(self.answers.ended)),
            agreement=agreement(self.scores_MK, self.answers.rewards_MK),
            seconds=seconds,
            seconds_before=seconds_before,
        )

    def rows(self) -> list[dict[str, object]]:
        """Each answer with its question, its true reward and the reward model's score."""
        samples = self.answers.rewards_MK.shape[1]
        figures = zip(self.answers.rewards_MK.ravel().tolist(), self.scores_MK.ravel().tolist(), strict=True)
        return [
            {
                "question": self.prompts[number // samples].question,
                "answer": text,
                "true_reward": reward,
                "model_reward": score,
            }
            for number, (text, (reward, score)) in enumerate(zip(self.answers.texts, figures, strict=True))
        ]


def evaluate(task: Task) -> dict[str, Measured]:
    """Measure the models of a seed on the held-out topics, in a process of its own."""
    torch.set_num_threads(1)  # more would only wait for each other on matrices this small
    transformers_logging.disable_progress_bar()
    evaluation = Evaluation(prompts(HELDOUT_TOPICS), load_tokenizer(str(task.tokenizer)), SAMPLES, MAX_NEW_TOKENS)
    sft, judge = _language_model(task.folders["sft"]), _reward_model(task.reward_model)
    against = evaluation.answers(sft)
    found = {}
    for name, folder in task.folders.items():
        model = _language_model(folder)
        answers = against if name == "sft" else evaluation.answers(model)
        found[name] = Measured(
            evaluation.prompts,
            answers,
            win_rate(answers.rewards_MK, against.rewards_MK),
            scores(judge, answers.sequences).reshape(answers.rewards_MK.shape),
            mean_kl(predict(model, answers.sequences, BATCH), predict(sft, answers.sequences, BATCH)),
        )
    return found


def win_rate(rewards_MK: np.ndarray, against_MK: np.ndarray) -> float:
    """The share in [0, 1] won of all pairs of one's and the other's answers to a prompt; a tie counts half."""
    return float(wins(rewards_MK[:, :, None], against_MK[:, None, :]).mean())


def agreement(scores_MK: np.ndarray, rewards_MK: np.ndarray) -> float:
    """How often the reward model sides with the true reward, of two answers of a model's to a prompt; a tie is half.

    Only pairs of different true rewards count; NaN where there is none.
    """
    better_MKK = rewards_MK[:, :, None] > rewards_MK[:, None, :]
    sides_MKK = wins(scores_MK[:, :, None], scores_MK[:, None, :])
    return float(sides_MKK[better_MKK].mean()) if better_MKK.any() else math.nan


@torch.no_grad()
def scores(judge: PreTrainedModel, sequences: Sequence[TokenSequence]) -> np.ndarray:
    """A reward model's scores (paper Eq. 1), float64 [N]: its scalar head at the last token of each sequence."""
    found = []
    for sequence in sequences:
        tokens_1S = torch.as_tensor(sequence.tokens, dtype=torch.int64)[None]
        hidden_1H = judge.base_model(input_ids=tokens_1S).last_hidden_state[:, -1]
        found.append(float(judge.score(hidden_1H)))
    return np.array(found)


@torch.no_grad()
def mean_kl(policy: Predictions, reference: Predictions) -> float:
    """KL(π ‖ π_reference) in nats, the mean over response tokens, from whole logits in float64."""
    count, total = len(policy.hidden_TH), 0.0
    for start in range(0, count, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, count)
        log_p = policy.log_probs(start, stop)
        total += float((log_p.exp() * (log_p - reference.log_probs(start, stop))).sum())
    return total / count


def _language_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()


def _reward_model(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
