"""The miniature's true reward on answers whose grade is known, and preferences that follow it with the right noise."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from megatron_aligndistil.launch import paper_mini_task
from megatron_aligndistil.launch.paper_mini_task import (
    POLITE_CLOSINGS,
    READING,
    TOPICS,
    WRITING,
    candidate,
    demonstrations,
    preference_pairs,
    preferred,
    prompts,
    split_sentences,
    true_reward,
)
from megatron_aligndistil.launch.quickstart_sentences import HELDOUT_TOPICS, TRAIN_TOPICS

TOPIC = "brew a good cup of tea"
FIRST, SECOND, THIRD = TOPICS[TOPIC]
OTHER = TOPICS["swim faster"][0]
WARM, PLAIN, POLITE, FILLER = (
    "I'm glad you asked!",
    "This is quite simple.",
    POLITE_CLOSINGS[0],
    "It has always been so.",
)

GRADES = [
    ((WARM, FIRST, SECOND, POLITE), 4.0),
    ((WARM, FIRST, SECOND, THIRD, POLITE), 4.0),  # a third tip neither gains nor costs
    ((WARM, FIRST, POLITE), 3.0),
    ((PLAIN, FIRST, SECOND), 2.0),
    ((FIRST, SECOND), 2.0),
    ((FIRST, WARM), 0.5),  # warmth opens an answer
    ((WARM, FIRST, FIRST), 1.5),  # a repetition is filler
    ((WARM, OTHER), 0.5),
    ((OTHER, FIRST), 0.5),  # another topic's tip is no opening
    ((POLITE, FIRST), 1.0),  # a closing belongs to the end, and an opening is free
    ((WARM, FIRST, POLITE, POLITE), 2.5),
    ((WARM, FIRST, FILLER, FILLER, FILLER), 0.5),
    ((WARM, FIRST[:-2] + "!"), 0.5),  # word for word
    ((), 0.0),
]


@pytest.mark.parametrize(("sentences", "grade"), GRADES)
def test_the_reward_grades_openings_tips_endings_and_rambling(sentences: tuple[str, ...], grade: float) -> None:
    assert true_reward(TOPIC, " ".join(sentences)) == grade


def test_sentences_end_with_their_marks_and_the_text() -> None:
    assert split_sentences(" Is it so? Yes!  It is... and") == ["Is it so?", "Yes!", "It is...", "and"]
    assert split_sentences(" \n") == []


@pytest.mark.parametrize("sentence", [tip for tips in TOPICS.values() for tip in tips] + list(POLITE_CLOSINGS))
def test_every_graded_sentence_is_one_sentence(sentence: str) -> None:
    assert split_sentences(sentence) == [sentence]


def test_training_and_evaluation_share_no_topic_and_no_tip() -> None:
    assert not TRAIN_TOPICS.keys() & HELDOUT_TOPICS.keys()
    heldout = {tip for tips in HELDOUT_TOPICS.values() for tip in tips}
    questions = {prompt.question for prompt in prompts(HELDOUT_TOPICS)}
    for pair in preference_pairs(400, seed=5):
        assert pair.question not in questions
        assert not heldout & {*split_sentences(pair.chosen), *split_sentences(pair.rejected)}


def test_every_prompt_comes_up_once_before_any_does_again() -> None:
    every = len(prompts(TRAIN_TOPICS))
    counts = Counter(pair.question for pair in preference_pairs(2 * every, seed=1))
    assert set(counts.values()) == {2} and len(counts) == every


def test_candidates_have_the_habits_that_they_are_given() -> None:
    rng = random.Random(0)
    answers = [candidate(rng, TOPIC, TRAIN_TOPICS, WRITING) for _ in range(2000)]
    warm = sum(paper_mini_task.opens_warmly(answer) for answer in answers) / len(answers)
    polite = sum(answer.endswith(POLITE_CLOSINGS) for answer in answers) / len(answers)
    assert warm == pytest.approx(WRITING.warm, abs=0.05) and polite == pytest.approx(WRITING.polite, abs=0.05)
    tips = [sentence for answer in answers for sentence in split_sentences(answer) if sentence in TOPICS[TOPIC]]
    wanted = sum(count * weight for count, weight in enumerate(WRITING.tips)) / sum(WRITING.tips)
    assert len(tips) / len(answers) == pytest.approx(wanted * WRITING.on_topic, rel=0.05)


def test_what_the_base_model_reads_knows_every_topic() -> None:
    found = {sentence for _, answer in demonstrations(3000, TOPICS, READING, 0) for sentence in split_sentences(answer)}
    assert found >= {tip for tips in TOPICS.values() for tip in tips}


def test_preferences_follow_bradley_terry() -> None:
    """The share in which the better answer is chosen, by the difference of rewards, against σ(difference)."""
    topic_of = {prompt.question: prompt.topic for prompt in prompts(TRAIN_TOPICS)}
    gains = Counter[float]()
    for pair in preference_pairs(20000, seed=3):
        topic = topic_of[pair.question]
        gains[true_reward(topic, pair.chosen) - true_reward(topic, pair.rejected)] += 1
    checked = 0
    for gain in (0.5, 1.0, 1.5, 2.0, 3.0):
        count = gains[gain] + gains[-gain]
        error = math.sqrt(preferred(gain) * preferred(-gain) / count)
        assert gains[gain] / count == pytest.approx(preferred(gain), abs=4 * error)
        checked += count
    assert checked > 8000
    assert preferred(0.0) == 0.5 and preferred(2.0) == pytest.approx(1 / (1 + math.exp(-2)))


def test_the_same_seed_gives_the_same_rows_and_another_one_others() -> None:
    assert preference_pairs(50, seed=1) == preference_pairs(50, seed=1) != preference_pairs(50, seed=2)
