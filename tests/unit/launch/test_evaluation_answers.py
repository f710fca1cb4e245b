"""What names an answer in the cache: all that changes it, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from megatron_aligndistil.config.compose import load_overrides
from megatron_aligndistil.config.evaluation_schema import EVALUATIONS
from megatron_aligndistil.evaluation.benchmark import Question
from megatron_aligndistil.evaluation.content_cache import ContentCache
from megatron_aligndistil.launch.analysis_bench import Bench, Named
from megatron_aligndistil.launch.evaluation_answers import Conversation, Respondent
from tests.integration.program import write_model

QUESTION = Question("here:1", ({"role": "user", "content": "red and blue"},))
# Both begin an answer alike; the second ends a turn with another token too.
TEMPLATE = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
OTHER = "{% for m in messages %}{{ m.content }}{{ '<pad>' if m.role == 'assistant' else '<eos>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}:{% endif %}"
)

VLLM = ("sampling.engine=vllm", "sampling.vllm.python=python")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("respondent") / "model", 0)


def respondent(model: Path, *overrides: str) -> Respondent:
    given = [f"model.restore_from_path={model}", "output=here", "reward.source=vanilla", *overrides]
    config = load_overrides(EVALUATIONS["reward"], given, "reward", None)
    return Respondent(cast(Bench, None), config, 64, ContentCache(model), "own", Named("models.own", str(model)))


def wanted(model: Path, place: int = 0, *overrides: str) -> tuple[dict[str, Any], Conversation]:
    conversation = Conversation(list(QUESTION.prompt))
    return respondent(model, *overrides)._wanted(QUESTION, conversation, place, 0), conversation


def test_a_greedy_answer_is_known_at_any_place_and_seed(model: Path) -> None:
    assert wanted(model, 0)[0] == wanted(model, 3, "seed=7")[0]
    drawn = ("sampling.temperature=0.5",)
    assert len({str(wanted(model, place, *drawn, f"seed={seed}")[0]) for place in (0, 3) for seed in (1, 7)}) == 4


def test_what_ends_an_answer_and_what_starts_the_engine_count(model: Path, tmp_path: Path) -> None:
    found = []
    for name, template in (("one", TEMPLATE), ("other", OTHER)):
        (tmp_path / name).write_text(template)
        found.append(wanted(model, 0, f"model.data.chat_template={tmp_path / name}")[0])
    assert found[0]["prompt"] == found[1]["prompt"] and found[0] != found[1]
    quantized = "sampling.vllm.extra_args=[--quantization,fp8]"
    assert wanted(model, 0, *VLLM)[0] != wanted(model, 0, *VLLM, quantized)[0]


def test_a_turn_with_less_room_is_counted(model: Path) -> None:
    asked, conversation = wanted(model)
    assert (asked["max_new_tokens"], conversation.cramped, conversation.cut) == (64, 0, 0)
    prompt = len(asked["prompt"])
    asked, conversation = wanted(model, 0, f"model.encoder_seq_length={prompt + 5}")
    assert (asked["max_new_tokens"], conversation.cramped, conversation.cut) == (5, 1, 0)


def test_vllm_draws_prompts_of_any_length_together(model: Path) -> None:
    asked = wanted(model, 0, *VLLM)[0]
    missing = {i: {**asked, "max_new_tokens": 1 + i % 64} for i in range(300)}
    windows = list(respondent(model, *VLLM)._windows(missing))
    assert [len(places) for _, places in windows] == [256, 44]
    assert sorted(i for _, places in windows for i in places) == list(range(300))
    for how, places in windows:
        assert how.max_new_tokens == max(missing[i]["max_new_tokens"] for i in places)
