"""Every schema gives the record that it means, and every defect is named with file:row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from megatron_aligndistil.data.records import read_record, read_records
from megatron_aligndistil.data.sources import Source, open_rows, resolve
from megatron_aligndistil.errors import DataError, UserError
from megatron_aligndistil.types import Record
from tests.unit.data.conftest import WriteJsonl, answer, ask, pair_row

PAIR = Record("f:1", (ask("Why?"),), ("Because.", "Dunno."))


@pytest.mark.parametrize(
    "row",
    [
        {**pair_row("Why?", "Because.", "Dunno."), "messages": [ask("Why?"), answer("Because.")], "score_chosen": 9.0},
        {"prompt": None, "chosen": [ask("Why?"), answer("Because.")], "rejected": [ask("Why?"), answer("Dunno.")]},
        {"prompt": "Why?", "chosen": "Because.", "rejected": "Dunno."},
        {"prompt": "Why?", "chosen": [answer("Because.")], "rejected": [answer("Dunno.")]},
        {"prompt": [ask("Why?")], "chosen": [answer("Because.")], "rejected": [answer("Dunno.")]},
        {"prompt": [ask("Why?")], "chosen": "Because.", "rejected": "Dunno."},
        {"chosen": "Why? Because.", "rejected": "Why? Dunno."},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: Dunno."},
    ],
    ids=["ultrafeedback", "implicit", "text", "turns", "prompt-turns", "mixed", "shared-prefix", "transcript"],
)
def test_preference_schemas(row: dict[str, Any]) -> None:
    assert read_record(row, "f:1") == PAIR


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ask("Why?"), answer("Because.")]},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": "Why?", "response": "Because."},
        {"prompt": [ask("Why?")], "completion": [answer("Because.")]},
    ],
)
def test_demonstration_schemas(row: dict[str, Any]) -> None:
    assert read_record(row, "f:1") == Record("f:1", (ask("Why?"),), ("Because.",))


def test_a_conversation_keeps_its_earlier_turns_in_the_prompt() -> None:
    turns = [{"role": "system", "content": ""}, ask("1+1?"), answer("2"), ask("And 2+2?")]
    assert read_record({"messages": [*turns, answer("4")]}, "f:1").prompt == tuple(turns)
    row = {"prompt": "1+1?", "chosen": [*turns, answer("4")], "rejected": [*turns, answer("5")]}
    assert read_record(row, "f:1") == Record("f:1", tuple(turns), ("4", "5"))
    continued = {"prompt": [ask("1+1?")], "completion": [answer("2"), ask("And 2+2?"), answer("4")]}
    assert read_record(continued, "f:1").prompt == (ask("1+1?"), answer("2"), ask("And 2+2?"))


def test_a_shared_prefix_never_ends_inside_a_word() -> None:
    record = read_record({"chosen": "The sky is bluish.", "rejected": "The sky is blue."}, "f:1")
    assert record == Record("f:1", (ask("The sky is"),), ("bluish.", "blue."))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Why?", "chosen": "Because."}, "field rejected is missing"),
        ({"prompt": "Why?", "chosen": "Because.", "rejected": ""}, "rejected is empty"),
        ({"prompt": "Why?", "chosen": " \n", "rejected": "no"}, "chosen is empty"),
        (pair_row("Why?", "Because.", ""), "rejected[1].content is empty"),
        ({"prompt": "", "completion": "Because."}, "prompt is empty"),
        ({"prompt": [], "completion": "Because."}, "prompt is empty"),
        ({"completion": "Because."}, "field prompt is missing"),
        ({"prompt": 7, "completion": "Because."}, "prompt is 7"),
        ({"prompt": "Why?", "completion": 7}, "completion is 7"),
        ({"question": "Why?"}, "no response in its fields question"),
        ({}, "its fields none"),
        ({"messages": [answer("Because.")]}, "without a prompt"),
        ({"messages": [ask("Why?")]}, "ends with 'user'"),
        ({"messages": []}, "ends with 'nothing'"),
        ({"messages": [ask("Why?"), answer("a"), answer("b")]}, "two assistant messages in a row"),
        ({"messages": [{"from": "human", "value": "Why?"}]}, "messages[0] is {'from': 'human'"),
        ({"messages": [{"role": "user", "content": None}, answer("b")]}, "messages[0].content is None"),
        (
            {"chosen": [ask("Why?"), answer("a")], "rejected": [ask("How?"), answer("b")]},
            "different prompts, 'Why?' and 'How?'",
        ),
        (
            {"prompt": "When?", "chosen": [ask("Why?"), answer("a")], "rejected": [ask("Why?"), answer("b")]},
            "prompt 'When?' isn't the one that chosen begins with",
        ),
        ({"chosen": "Yes", "rejected": "No"}, "share no prompt"),
        ({"chosen": "Why? ", "rejected": "Why? No"}, "the response of chosen is empty"),
        ({"prompt": "Why?", "completion": "half \ud83d of it"}, "half a surrogate pair"),
    ],
)
def test_defects_of_a_row(row: dict[str, Any], said: str, write_jsonl: WriteJsonl) -> None:
    good = {"messages": [ask("Why?"), answer("Because.")]}
    path = write_jsonl(good, "", row)
    with pytest.raises(DataError) as caught:
        list(read_records(path, "demonstration"))
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and said in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "Why?", "completion": ', "not valid JSON, Expecting value at column 33"),
        ("prompt: Why?", "not valid JSON"),
        ("[1, 2]", "isn't a JSON object"),
    ],
)
def test_malformed_lines(line: str, said: str, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl({"prompt": "Why?", "completion": "So."}, line)
    with pytest.raises(DataError, match="jsonl:2: ") as caught:
        list(read_records(path, "demonstration"))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n{"prompt": "caf\xe9", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: not UTF-8, byte 16 is b'\\xe9'"):
        list(read_records(str(path), "demonstration"))


def test_columns_may_differ_from_row_to_row(write_jsonl: WriteJsonl) -> None:
    """A reader that infers one type a column would fail here, or turn the dates into timestamps."""
    path = write_jsonl(
        {"prompt": "When?", "completion": "2024-01-01"},
        {"prompt": [ask("When?")], "completion": [answer("2024-01-02")], "extra": {"a": 1}},
        {"messages": [ask("When?"), {"role": "assistant", "content": "2024-01-03", "name": "x"}]},
    )
    assert [r.responses[0] for r in read_records(path, "demonstration")] == ["2024-01-01", "2024-01-02", "2024-01-03"]


@pytest.mark.parametrize(("which", "expected"), [("chosen", ["a"]), ("rejected", ["b"]), ("both", ["a", "b"])])
def test_demonstrations_of_pairs(which: str, expected: list[str], write_jsonl: WriteJsonl) -> None:
    records = list(read_records(write_jsonl(pair_row("Why?", "a", "b")), "demonstration", which))
    assert [record.responses for record in records] == [(text,) for text in expected]


def test_a_preference_needs_pairs(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl({"prompt": "Why?", "completion": "So."})
    with pytest.raises(DataError, match="jsonl:1: not a preference, its fields are prompt, completion"):
        list(read_records(path, "preference"))


def test_labelled_responses(write_jsonl: WriteJsonl) -> None:
    """A pair gives a desirable and an undesirable one; rows of both schemas may stand in one file."""
    path = write_jsonl(
        {"prompt": "Why?", "completion": "So.", "label": True},
        {"messages": [ask("Why?"), answer("Dunno.")], "label": False},
        {**pair_row("Why?", "a", "b"), "label": None},
        {"prompt": [ask("Why?")], "completion": [answer("c")], "label": False},
    )
    found = [(r.origin, r.responses, r.desirable) for r in read_records(path, "unpaired")]
    assert found == [
        (f"{path}:1", ("So.",), True),
        (f"{path}:2", ("Dunno.",), False),
        (f"{path}:3", ("a",), True),
        (f"{path}:3", ("b",), False),
        (f"{path}:4", ("c",), False),
    ]
    (plain, *_) = read_records(path, "demonstration")
    assert plain.desirable is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "field label is missing, its fields are prompt, completion; add true (desirable) or false"),
        ({"label": None}, "field label is missing"),
        ({"label": 1}, "label is 1; it must be true (desirable) or false"),
        ({"label": "true"}, "label is 'true'; it must be true (desirable) or false"),
    ],
)
def test_labels_that_are_none(more: dict[str, Any], said: str, write_jsonl: WriteJsonl) -> None:
    row = {"prompt": "Why?", "completion": "So."}
    path = write_jsonl({**row, "label": False}, {**row, **more})
    with pytest.raises(DataError) as caught:
        list(read_records(path, "unpaired"))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: {said}") and "\n" not in message


def test_unknown_responses(write_jsonl: WriteJsonl) -> None:
    with pytest.raises(UserError, match=r"model\.data\.responses='best' is unknown"):
        list(read_records(write_jsonl(pair_row("Why?", "a", "b")), "demonstration", "best"))


def test_parquet_and_folders(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    write_jsonl(pair_row("one", "a", "b"), name="b.jsonl")
    rows = [pair_row("two", "a", "b"), {**pair_row("three", "a", "b"), "prompt": None}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "notes.md").write_text("not data")
    records = list(read_records(str(tmp_path), "preference"))
    assert [record.prompt[0]["content"] for record in records] == ["two", "three", "one"]
    assert [Path(record.origin).name for record in records] == ["a.parquet:1", "a.parquet:2", "b.jsonl:1"]


def test_files_without_rows(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(str(tmp_path / "none.parquet"))
    for path in (write_jsonl(name="none.jsonl"), write_jsonl("", "  ", name="blank.jsonl"), tmp_path / "none.parquet"):
        with pytest.raises(DataError, match=r"(none|blank)\.\w+: holds no rows"):
            list(read_records(str(path), "demonstration"))


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read \(.*\); write the file again"):
        list(read_records(str(path), "preference"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.jsonl", "no such file or folder"),
        ("./missing", "no such file or folder"),
        ("/no/such/folder/data", "no such file or folder"),
        ("empty", "holds no .jsonl or .parquet file"),
        ("rows.csv", "cannot read .csv"),
    ],
)
def test_sources_that_are_not_there(source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(DataError) as caught:
        resolve(source)
    assert str(caught.value).startswith(f"{source}: ") and said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hub_name", "split"),
    [("squad", "squad", None), ("owner/name_1.0", "owner/name_1.0", None), ("o/n:train[:5%]", "o/n", "train[:5%]")],
)
def test_hub_names(name: str, hub_name: str, split: str | None) -> None:
    assert resolve(name) == [Source(name, None, hub_name, split)]


def test_hub_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``load_dataset`` takes a local folder in a hub name's place, so the choice of a split runs for real here."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(pair_row(split, "a", "b")) + "\n")
    default, test = (open_rows(Source("n", None, str(folder), split), "") for split in (None, "test"))
    assert default["prompt"][0] == "train" and test["prompt"][0] == "test"
    with pytest.raises(DataError, match=r"n: .*not loaded from the hub"):
        open_rows(Source("n", None, str(folder), "dev"), "")
    (folder / "train.jsonl").rename(folder / "validation.jsonl")
    with pytest.raises(DataError, match="n: has the splits validation, test; name one"):
        open_rows(Source("n", None, str(folder), None), "")


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no-such-owner/no-such-set: .*not loaded from the hub"):
        list(read_records("no-such-owner/no-such-set", "preference"))
