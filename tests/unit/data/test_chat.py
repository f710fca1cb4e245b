"""Rendering and masks with real tokenizers: what is learnt is exactly the response and its end token."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from megatron_aligndistil.data.chat import ChatFormat, render_prompt, stop_token_ids
from megatron_aligndistil.data.tokenize import LengthPolicy, Tokenized, limit, tokenize
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.types import Record
from tests.unit.data.conftest import answer, ask

WIDE = LengthPolicy(10_000, 20_000, "drop", "drop")
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TURN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THOUGHTFUL_TEMPLATE = PLAIN_TEMPLATE.replace("assistant: {% endif", "assistant: (thinks){% endif")
SYSTEM_TEMPLATE = "{% if messages[0]['role'] != 'system' %}system: be brief\n{% endif %}" + PLAIN_TEMPLATE
STRICT_TEMPLATE = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PLAIN_TEMPLATE
)


def one(tokenizer: PreTrainedTokenizerBase, *responses: str, prompt: str = "Why is it so?") -> Tokenized:
    return tokenize([Record("f:1", (ask(prompt),), responses)], ChatFormat(tokenizer), WIDE)[0]


def test_qwen_learns_the_response_and_its_end(qwen: PreTrainedTokenizerBase) -> None:
    row = one(qwen, "Because.", " Who\n knows?")
    assert [qwen.decode(ids) for ids in row.responses] == ["Because.<|im_end|>", " Who\n knows?<|im_end|>"]
    assert row.prompt == render_prompt(qwen, [ask("Why is it so?")])
    assert qwen.decode(row.prompt) == (
        "<|im_start|>user\nWhy is it so?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert stop_token_ids(qwen) == [qwen.eos_token_id]


def test_a_templates_own_system_prompt_is_in_training_and_generation(base_tokenizer: PreTrainedTokenizerBase) -> None:
    base_tokenizer.chat_template = SYSTEM_TEMPLATE
    row = one(base_tokenizer, "the dog")
    assert base_tokenizer.decode(row.prompt) == "system: be brief\nuser: Why is it so?\nassistant: "
    assert row.prompt == render_prompt(base_tokenizer, [ask("Why is it so?")])


@pytest.mark.slow
def test_smollm2_has_its_system_prompt_in_training_and_generation(smollm2: PreTrainedTokenizerBase) -> None:
    row = one(smollm2, "Because.")
    prompt = smollm2.decode(row.prompt)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nWhy is it so?<|im_end|>\n<|im_start|>assistant\n")
    assert row.prompt == render_prompt(smollm2, [ask("Why is it so?")])
    assert smollm2.decode(row.responses[0]) == "Because.<|im_end|>"


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.text(min_size=1).filter(str.strip),
    response=st.text(alphabet=st.characters(codec="utf-8"), min_size=1).filter(str.strip),
)
def test_any_text_survives(qwen: PreTrainedTokenizerBase, prompt: str, response: str) -> None:
    row = one(qwen, response, prompt=prompt.encode("utf-8", "ignore").decode() or "x")
    normalized = qwen.backend_tokenizer.normalizer.normalize_str(response.lstrip("\n"))  # the template strips newlines
    assert qwen.decode(row.responses[0]) == normalized + "<|im_end|>"
    assert row.responses[0].count(qwen.eos_token_id) == 1


def test_eos_is_appended_where_the_template_writes_none(base_tokenizer: PreTrainedTokenizerBase) -> None:
    base_tokenizer.chat_template = PLAIN_TEMPLATE
    row = one(base_tokenizer, "the dog")
    assert base_tokenizer.decode(row.prompt + row.responses[0]) == "user: Why is it so?\nassistant: the dog\n<|end|>"
    assert stop_token_ids(base_tokenizer) == [base_tokenizer.eos_token_id]


def test_a_templates_own_end_token_wins_over_another_eos(base_tokenizer: PreTrainedTokenizerBase) -> None:
    base_tokenizer.chat_template = TURN_TEMPLATE
    row = one(base_tokenizer, "the dog")
    assert base_tokenizer.decode(row.responses[0]) == "the dog<|turn|>"
    turn = base_tokenizer.convert_tokens_to_ids("<|turn|>")
    assert stop_token_ids(base_tokenizer) == [turn, base_tokenizer.eos_token_id]


def test_a_merge_across_the_border_leaves_the_prompt_as_generation_sees_it(
    base_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The prompt ends with a space that a joint tokenization would merge into the response's first word."""
    base_tokenizer.chat_template = PLAIN_TEMPLATE
    prompt = render_prompt(base_tokenizer, [ask("Why is it so?")])
    joint = base_tokenizer("user: Why is it so?\nassistant: the dog\n", add_special_tokens=False)["input_ids"]
    assert joint[: len(prompt)] != prompt  # the case is a real one
    row = one(base_tokenizer, "the dog")
    assert row.prompt == prompt and base_tokenizer.decode(row.responses[0]) == "the dog\n<|end|>"


def test_no_chat_template(base_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"base has no chat template; .*model\.data\.chat_template"):
        ChatFormat(base_tokenizer)


def test_no_end_at_all(base_tokenizer: PreTrainedTokenizerBase) -> None:
    base_tokenizer.chat_template = PLAIN_TEMPLATE
    base_tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos_token"):
        one(base_tokenizer, "the dog")


def test_a_template_whose_prompt_differs_with_a_response(base_tokenizer: PreTrainedTokenizerBase) -> None:
    base_tokenizer.chat_template = THOUGHTFUL_TEMPLATE
    with pytest.raises(
        DataError, match=r"f:1: the chat template writes a prompt otherwise .*model\.data\.chat_template"
    ):
        one(base_tokenizer, "the dog")


def test_roles_that_a_template_refuses(base_tokenizer: PreTrainedTokenizerBase) -> None:
    base_tokenizer.chat_template = STRICT_TEMPLATE
    record = Record("f:9", ({"role": "system", "content": "s"}, ask("q")), ("a",))
    with pytest.raises(DataError, match=r"f:9: the chat template fails on the roles system, user \(user first\)"):
        tokenize([record], ChatFormat(base_tokenizer), WIDE)


def test_a_template_file_replaces_the_tokenizers_own(base_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    base_tokenizer.chat_template = STRICT_TEMPLATE
    base_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "plain.jinja"
    file.write_text(PLAIN_TEMPLATE)
    tokenizer = load_tokenizer(str(tmp_path), str(file))
    assert tokenizer.decode(render_prompt(tokenizer, [ask("a"), answer("b"), ask("c")])) == (
        "user: a\nassistant: b\nuser: c\nassistant: "
    )
    with pytest.raises(ConfigError, match=r"model\.data\.chat_template=.*none\.jinja: not readable"):
        load_tokenizer(str(tmp_path), str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("long_prompt", "long_response", "prompt", "responses", "expected"),
    [
        ("drop", "drop", 4, (3, 6), ([0, 1, 2, 3], [3, 6], False, "")),
        ("drop", "drop", 5, (3, 3), "prompt over 4 tokens"),
        ("drop", "drop", 4, (3, 7), "prompt and response over 10 tokens"),
        ("truncate_left", "drop", 6, (3, 6), ([2, 3, 4, 5], [3, 6], True, "")),
        ("drop", "truncate_right", 4, (7, 3), ([0, 1, 2, 3], [6, 3], True, "")),
        ("truncate_left", "truncate_right", 9, (7, 9), ([5, 6, 7, 8], [6, 6], True, "")),
    ],
)
def test_limits(
    long_prompt: str, long_response: str, prompt: int, responses: tuple[int, int], expected: tuple | str
) -> None:
    """A pair is cut or dropped as a whole; the prompt loses its beginning, the responses their ends."""
    row = Tokenized("f:1", list(range(prompt)), [list(range(100, 100 + n)) for n in responses])
    out = limit(row, LengthPolicy(4, 10, long_prompt, long_response))
    if isinstance(expected, str):
        assert (out.dropped, out.prompt, out.responses, out.truncated) == (expected, [], [], False)
    else:
        assert (out.prompt, [len(r) for r in out.responses], out.truncated, out.dropped) == expected
        assert all(response[0] == 100 for response in out.responses)


def test_a_prompt_always_leaves_room_for_a_response() -> None:
    policy = LengthPolicy(1024, 8, "truncate_left", "truncate_right")
    out = limit(Tokenized("f:1", list(range(50)), [[7, 8, 9]]), policy)
    assert (len(out.prompt), out.responses) == (7, [[7]])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((0, 10, "drop", "drop"), r"model\.data\.max_prompt_length=0"),
        ((4, 1, "drop", "drop"), r"model\.encoder_seq_length=1"),
        ((4, 10, "truncate_right", "drop"), r"model\.data\.long_prompt='truncate_right' .* drop or truncate_left"),
        ((4, 10, "drop", "cut"), r"model\.data\.long_response='cut'"),
    ],
)
def test_limits_that_make_no_sense(arguments: tuple[int, int, str, str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        LengthPolicy(*arguments)
