"""The quickstart's preference set and the property that it teaches: an answer that opens warmly.

Chosen and rejected answers give two tips of the same topic; only the chosen one opens by being glad to help. Train and
held-out prompts share no topic.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.launch.quickstart_sentences import (
    HELDOUT_TOPICS,
    PLAIN_OPENINGS,
    QUESTIONS,
    TRAIN_TOPICS,
    WARM_OPENINGS,
)

PROPERTY = "opens warmly"
PROPERTY_RULE = "the first sentence has one of the words glad, happy, pleasure, delighted"
TIPS_IN_AN_ANSWER = 2

_FIRST_SENTENCE = re.compile(r"[^.!?\n]*")
_WARM_WORD = re.compile(r"\b(glad|happy|pleasure|delighted)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A question with the answer that is preferred and the one that isn't."""

    question: str
    chosen: str
    rejected: str

    def row(self) -> dict[str, object]:
        """The pair in UltraFeedback-binarized's schema."""
        prompt = {"role": "user", "content": self.question}
        return {
            "prompt": self.question,
            "chosen": [prompt, {"role": "assistant", "content": self.chosen}],
            "rejected": [prompt, {"role": "assistant", "content": self.rejected}],
        }


def opens_warmly(answer: str) -> bool:
    """Whether the first sentence of ``answer`` says that it is a pleasure to help."""
    first = _FIRST_SENTENCE.match(answer.lstrip())
    return first is not None and _WARM_WORD.search(first[0]) is not None


def property_rate(answers: Iterable[str]) -> float:
    """The share of ``answers`` that open warmly, in [0, 1].

    Raises:
        ValueError: there are no answers.
    """
    found = [opens_warmly(answer) for answer in answers]
    if not found:
        raise ValueError("the property's rate of no answers is undefined")
    return sum(found) / len(found)


def train_pairs(count: int, seed: int) -> list[Pair]:
    """``count`` pairs; every training topic comes up once before any comes up again."""
    rng = random.Random(f"train {seed}")
    pairs: list[Pair] = []
    while len(pairs) < count:
        topics = list(TRAIN_TOPICS)
        rng.shuffle(topics)
        pairs += [_pair(rng, topic, TRAIN_TOPICS) for topic in topics]
    return pairs[:count]


def heldout_pairs(questions_per_topic: int, seed: int) -> list[Pair]:
    """``questions_per_topic`` pairs with different questions for every held-out topic."""
    rng = random.Random(f"held out {seed}")
    return [
        _pair(rng, topic, HELDOUT_TOPICS, question)
        for topic in HELDOUT_TOPICS
        for question in rng.sample(QUESTIONS, questions_per_topic)
    ]


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """``pairs`` as JSONL, one row a pair."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(pair.row()) + "\n" for pair in pairs), encoding="utf-8")
    temporary.replace(path)


def _pair(rng: random.Random, task: str, topics: Mapping[str, tuple[str, ...]], question: str | None = None) -> Pair:
    asked = rng.choice(QUESTIONS) if question is None else question

    def answer(openings: tuple[str, ...]) -> str:
        opening = rng.choice(openings).format(task=task)
        return " ".join(filter(None, (opening, *rng.sample(topics[task], TIPS_IN_AN_ANSWER))))

    return Pair(asked.format(task=task), answer(WARM_OPENINGS), answer(PLAIN_OPENINGS))
