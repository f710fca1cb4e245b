"""The miniature's task: answers that are graded in code, and preferences drawn from the grades with noise.

A question asks for tips on a topic. ``true_reward`` is what every method ought to raise and what none of them sees:
training sees pairs of candidate answers, of which the one preferred was drawn by Bradley-Terry (paper Eq. 1).
Preferences come from the training topics alone; the questions of the evaluation from the held-out ones.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.launch.quickstart_pairs import Pair, opens_warmly
from megatron_aligndistil.launch.quickstart_sentences import (
    HELDOUT_TOPICS,
    PLAIN_OPENINGS,
    QUESTIONS,
    TRAIN_TOPICS,
    WARM_OPENINGS,
)

TOPICS: Mapping[str, tuple[str, ...]] = {**TRAIN_TOPICS, **HELDOUT_TOPICS}
POLITE_CLOSINGS = (
    "Good luck!",
    "I wish you success with it!",
    "I hope that this helps you.",
    "Let me know how it goes.",
    "Please ask me again at any time.",
)
FILLERS = (
    "There is a lot to say about this.",
    "People have many opinions on it.",
    "I could go on for a long time.",
    "That depends on many things.",
    "Some would say otherwise.",
    "As I said, it is not hard.",
    "It has always been like that.",
    "You may have heard this before.",
)
SAMPLES, MAX_NEW_TOKENS = 4, 96  # answers a question in the evaluation, and tokens of each
REWARDED_TIPS = 2
PENALTY = 0.5
REWARD_RULE = (
    "1 for a warm opening, 1 for each of up to two different tips of the asked topic, word for word, 1 for a polite "
    "ending, and -0.5 for every other sentence after the opening: tips of other topics, repetitions, filler"
)

_SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+$")


@dataclass(frozen=True)
class Habits:
    """How candidate answers are written: probabilities, and weights of the counts 0, 1, 2, …"""

    warm: float
    polite: float
    on_topic: float  # of each tip
    tips: tuple[float, ...]
    fillers: tuple[float, ...]


# What the base model has read: it knows each topic's tips, the held-out ones' too, as a large model would.
READING = Habits(warm=0.2, polite=0.2, on_topic=0.95, tips=(0, 1, 3, 2), fillers=(4, 2, 1))
# What demonstrations and candidates of pairs are like.
WRITING = Habits(warm=0.35, polite=0.35, on_topic=0.75, tips=(0, 2, 3, 2), fillers=(4, 3, 2, 1))


@dataclass(frozen=True)
class Prompt:
    """A question and the topic it asks for."""

    question: str
    topic: str


@dataclass(frozen=True)
class Grade:
    """What an answer is made of: ``tips`` different ones of the asked topic, ``others`` sentences that cost."""

    warm: bool
    tips: int
    polite: bool
    others: int

    @property
    def reward(self) -> float:
        """``REWARD_RULE``, at most 4."""
        return self.warm + min(self.tips, REWARDED_TIPS) + self.polite - PENALTY * self.others


def grade(topic: str, answer: str) -> Grade:
    """The grade of ``answer`` to a question for ``topic``."""
    sentences = split_sentences(answer)
    warm, polite, others, given = False, False, 0, set()
    for index, sentence in enumerate(sentences):
        if sentence in TOPICS[topic] and sentence not in given:
            given.add(sentence)
        elif index == 0 and sentence not in _ALL_TIPS:
            warm = opens_warmly(sentence)
        elif index == len(sentences) - 1 and sentence in POLITE_CLOSINGS:
            polite = True
        else:
            others += 1
    return Grade(warm, len(given), polite, others)


def true_reward(topic: str, answer: str) -> float:
    """The reward of ``answer`` to a question for ``topic``: ``REWARD_RULE``."""
    return grade(topic, answer).reward


def split_sentences(text: str) -> list[str]:
    """The sentences of ``text``, each with its end mark; what has none at the end of the text is one too."""
    return [sentence.strip() for sentence in _SENTENCE.findall(text) if sentence.strip()]


def candidate(rng: random.Random, topic: str, topics: Mapping[str, Sequence[str]], habits: Habits) -> str:
    """An answer to a question for ``topic``; wrong tips are taken from the others of ``topics``."""
    opening = rng.choice(WARM_OPENINGS if rng.random() < habits.warm else PLAIN_OPENINGS).format(task=topic)
    wanted = rng.choices(range(len(habits.tips)), habits.tips)[0]
    own = rng.sample(topics[topic], len(topics[topic]))
    others = [tip for name, tips in topics.items() if name != topic for tip in tips]
    tips = [own.pop() if rng.random() < habits.on_topic and own else rng.choice(others) for _ in range(wanted)]
    fillers = rng.sample(FILLERS, rng.choices(range(len(habits.fillers)), habits.fillers)[0])
    middle = [*tips, *fillers]
    rng.shuffle(middle)
    closing = rng.choice(POLITE_CLOSINGS) if rng.random() < habits.polite else ""
    return " ".join(filter(None, (opening, *middle, closing)))


def prompts(topics: Iterable[str]) -> list[Prompt]:
    """Every question for every topic."""
    return [Prompt(question.format(task=topic), topic) for topic in topics for question in QUESTIONS]


def demonstrations(
    count: int, topics: Mapping[str, Sequence[str]], habits: Habits, seed: int
) -> list[tuple[Prompt, str]]:
    """``count`` prompts, each one coming up once before any comes up again, with a candidate answer."""
    rng = random.Random(f"demonstrations {seed}")
    return [(prompt, candidate(rng, prompt.topic, topics, habits)) for prompt in _dealt(rng, count, topics)]


def preference_pairs(count: int, seed: int) -> list[Pair]:
    """``count`` pairs of candidates for the training topics' prompts, chosen by ``preferred``."""
    rng = random.Random(f"pairs {seed}")
    pairs = []
    for prompt in _dealt(rng, count, TRAIN_TOPICS):
        first = candidate(rng, prompt.topic, TRAIN_TOPICS, WRITING)
        second = first
        while second == first:
            second = candidate(rng, prompt.topic, TRAIN_TOPICS, WRITING)
        gain = true_reward(prompt.topic, first) - true_reward(prompt.topic, second)
        chosen, rejected = (first, second) if rng.random() < preferred(gain) else (second, first)
        pairs.append(Pair(prompt.question, chosen, rejected))
    return pairs


def preferred(gain: float) -> float:
    """The probability that an answer is preferred to another whose reward is ``gain`` lower: Bradley-Terry."""
    return 1.0 / (1.0 + math.exp(-gain))


def write_demonstrations(rows: Iterable[tuple[Prompt, str]], path: Path) -> None:
    """Prompts and responses as JSONL."""
    lines = (json.dumps({"prompt": prompt.question, "response": answer}) + "\n" for prompt, answer in rows)
    write_text(path, "".join(lines))


def _dealt(rng: random.Random, count: int, topics: Iterable[str]) -> list[Prompt]:
    every = prompts(topics)
    dealt: list[Prompt] = []
    while len(dealt) < count:
        rng.shuffle(every)
        dealt += every
    return dealt[:count]


_ALL_TIPS = frozenset(tip for tips in TOPICS.values() for tip in tips)
