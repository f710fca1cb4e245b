"""Rows of every schema, and the chat templates that write them: records and tokens, or one line that names the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import strategies as st

from megatron_aligndistil.data.chat import ChatFormat
from megatron_aligndistil.data.records import Kind, records_of
from megatron_aligndistil.data.sources import Source, read_row
from megatron_aligndistil.data.tokenize import LengthPolicy, tokenize
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.types import Record
from tests.fuzz.mutations import spoiled_bytes, spoiled_json
from tests.fuzz.reader import Reader
from tests.integration.program import write_model

TURNS = [{"role": "system", "content": ""}, {"role": "user", "content": "red?"}]
ANSWER = {"role": "assistant", "content": "blue stone"}
ROWS: list[dict[str, Any]] = [
    {"prompt": "red", "chosen": "blue", "rejected": "green"},
    {"prompt": "red", "prompt_id": "1", "chosen": [*TURNS, ANSWER], "rejected": [*TURNS, {**ANSWER, "content": "x"}]},
    {"prompt": TURNS, "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "sand"}], "score_chosen": 4.5},
    {"chosen": "\n\nHuman: red?\n\nAssistant: blue", "rejected": "\n\nHuman: red?\n\nAssistant: green"},
    {"chosen": "red is a colour", "rejected": "red is a bird"},
    {"prompt": "red", "completion": "blue", "label": True},
    {"prompt": TURNS, "completion": [ANSWER], "label": False},
    {"prompt": "red", "response": "blue"},
    {"messages": [*TURNS, ANSWER]},
    {"messages": TURNS},
    {"prompt": "red"},
]
POLICY = LengthPolicy(16, 32, "truncate_left", "truncate_right")
SOURCE = Source("rows.jsonl", Path("rows.jsonl"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> ChatFormat:
    return ChatFormat(load_tokenizer(str(write_model(tmp_path_factory.mktemp("model") / "model", seed=1))))


def test_rows(record, chat) -> None:
    reader = Reader("rows")

    def run(kind: Kind, responses: str, text: str) -> None:
        origin, row = read_row(SOURCE, {"line": 7, "text": text}, 0)
        tokenize(list(records_of(row, origin, kind, responses)), chat, POLICY)

    kinds = st.tuples(st.sampled_from(get_args(Kind)), st.sampled_from(("chosen", "rejected", "both")))
    damaged = spoiled_bytes([json.dumps(row).encode() for row in ROWS]).map(lambda data: data.decode("utf-8", "ignore"))
    inputs = st.tuples(kinds, spoiled_json(ROWS) | damaged)
    record(reader.fuzz(inputs, lambda drawn: reader.read(lambda: run(*drawn[0], drawn[1]), "rows.jsonl:7")))


PIECES = (
    *("{% for m in messages %}", "{% endfor %}", "{{ m['role'] }}", "{{ m.content }}", "<eos>", "{{ messages }}"),
    *("{% if add_generation_prompt %}", "{% endif %}", "assistant: ", "{{ messages[0]['content'] }}", "{{ x.y.z }}"),
    *(
        "{{ raise_exception('no') }}",
        "{{ 1/0 }}",
        "{{ messages[99] }}",
        "{% set x = [] %}",
        "{{ [1][5] }}",
        "{{ x|y }}",
    ),
    *("{% include 'a' %}", "{% import 'os' as os %}", "{{ strftime_now('%Y') }}", "{{ messages|tojson }}", "{#", "#}"),
    *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os }}", "{{ 'a' * 3 }}"),
    *("{{ self._TemplateReference__context }}", "{{ messages.append(1) }}", "{% generation %}", "{{", "}}", "{%", "%}"),
    *(
        "{{ m['content'].split('e')[0] }}",
        "{{ m['tool_calls'] }}",
        "{{ none + 1 }}",
        "{% macro f() %}{{ f() }}",
        "\x00",
    ),
    *("{% endmacro %}", "{{ f() }}", "{% break %}", "{% raw %}", "{{ range(10**9) }}", "{{ 'a'.format(b) }}", "\n"),
    *("{{ '%s' % lipsum }}", "{{ namespace().x }}", "{{ m | attr('__class__') }}", "{{ '%d' % 'a' }}", "{{ -'a' }}"),
)


def test_chat_templates(record, chat) -> None:
    reader, tokenizer = Reader("chat templates"), chat.tokenizer
    sound = tokenizer.chat_template
    rows = [
        Record("rows.jsonl:7", tuple(TURNS), ("blue",)),
        Record("rows.jsonl:7", ({"role": "user", "content": "{{ 7 }}"},), ("blue", "green")),
    ]

    def check(template: str) -> None:
        tokenizer.chat_template = template
        reader.read(lambda: _render(ChatFormat(tokenizer), rows), "chat template", "chat_template")

    pieces = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
    damaged = spoiled_bytes([sound.encode()]).map(lambda data: data.decode("utf-8", "replace"))
    try:
        record(reader.fuzz(pieces | damaged, check))
    finally:
        tokenizer.chat_template = sound


def _render(chat: ChatFormat, rows: list[Record]) -> None:
    tokenize(rows, chat, POLICY)


def test_a_template_runs_no_code(chat, tmp_path) -> None:
    """What reaches for Python's own objects is refused by transformers' sandbox."""
    tokenizer, sound, marker = chat.tokenizer, chat.tokenizer.chat_template, tmp_path / "marker"
    way = "cycler.__init__.__globals__.os.mkdir"
    try:
        for reach in (f"{way}('{marker}')", f"lipsum.__globals__['os'].mkdir('{marker}')", "messages.clear()"):
            tokenizer.chat_template = "{{ " + reach + " }}"
            with pytest.raises(Exception, match=r"unsafe|undefined|no attribute"):
                _render(ChatFormat(tokenizer), [Record("rows.jsonl:7", tuple(TURNS), ("blue",))])
            assert not marker.exists()
    finally:
        tokenizer.chat_template = sound
