"""tools/prepare_data.py on small sources in each published schema: what is kept, what is refused, what is written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_aligndistil.data.records import read_records
from megatron_aligndistil.errors import DataError

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    import prepare_data

    return prepare_data


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ultrafeedback(prompt: str, chosen: str = "good", rejected: str = "bad", **more: Any) -> dict[str, Any]:
    turns = {"chosen": [asked(prompt), said(chosen)], "rejected": [asked(prompt), said(rejected)]}
    return {"prompt": prompt, "prompt_id": prompt, **turns, "score_chosen": 8.0, "score_rejected": 6.0, **more}


def comparison(post: str | None, choice: int, **info: Any) -> dict[str, Any]:
    about = {"subreddit": "tifu", "title": "T", "post": post, "article": None, "site": None, **info}
    return {"info": about, "summaries": [{"text": " one"}, {"text": " two"}], "choice": choice, "worker": "w"}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def source(folder: Path, train: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None) -> list[str]:
    """The arguments that name a folder with these rows and expect their numbers."""
    write(folder / "train.jsonl", train)
    if held_out is not None:
        write(folder / "test.jsonl", held_out)
    counts = ["--expect", str(len(train)), "--expect-held-out", str(len(held_out or []))]
    return ["--source", str(folder), *counts]


def dropped(output: Path, name: str) -> dict[str, int]:
    return json.loads((output / "summary.json").read_text())["files"][name]["dropped"]


def test_ultrafeedback_drops_and_counts_by_reason(tool, tmp_path):
    train = [
        ultrafeedback("a"),
        ultrafeedback("a"),
        ultrafeedback("a", chosen="better"),
        ultrafeedback("b", chosen="  "),
        ultrafeedback(""),
        ultrafeedback("c", score_rejected=8.0),
        ultrafeedback("d", rejected="good "),
        ultrafeedback("e"),
    ]
    held_out = [ultrafeedback("f"), ultrafeedback(" a ", chosen="another")]
    assert tool.main(["ultrafeedback", str(tmp_path / "out"), *source(tmp_path / "in", train, held_out)]) == 0
    assert [row["prompt"][0]["content"] for row in rows_of(tmp_path / "out" / "train.jsonl")] == ["a", "a", "e"]
    assert [row["prompt"] for row in rows_of(tmp_path / "out" / "validation.jsonl")] == [[asked("f")]]
    reasons = {"empty text": 2, "equal responses": 1, "repeated row": 1, "tied scores": 1}
    assert dropped(tmp_path / "out", "train.jsonl") == reasons
    assert dropped(tmp_path / "out", "validation.jsonl") == {"prompt of a training row": 1}


def test_files_are_hashed_and_read_back_as_our_records(tool, tmp_path):
    given = source(tmp_path / "in", [ultrafeedback("é\u2028x"), ultrafeedback("b")], [ultrafeedback("c")])
    tool.main(["ultrafeedback", str(tmp_path / "out"), *given])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name in ("train.jsonl", "validation.jsonl"):
        digest = hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
        assert summary["files"][name]["sha256"] == digest
    [first, second] = read_records(str(tmp_path / "out" / "train.jsonl"), "preference")
    assert (first.prompt, first.responses) == ((asked("é\u2028x"),), ("good", "bad"))
    assert second.prompt == (asked("b"),)
    assert summary["published_rows"] == {"train_prefs": 61_135, "test_prefs": 2_000}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "summary.json",
        "train.jsonl",
        "validation.jsonl",
    ]


def test_ultrachat_keeps_earlier_turns_as_the_prompt(tool, tmp_path):
    talk = [asked("hi"), said("hello"), asked("and?"), said("bye")]
    given = source(tmp_path / "in", [{"prompt": "hi", "messages": talk}], [{"messages": [asked("x"), said("y")]}])
    tool.main(["ultrachat", str(tmp_path / "out"), *given])
    assert rows_of(tmp_path / "out" / "train.jsonl") == [{"prompt": talk[:3], "completion": "bye"}]


def test_tldr_summaries_from_parquet_as_the_hub_names_it(tool, tmp_path):
    write(tmp_path / "in/data/train-00000-of-00001.parquet", [{"prompt": "POST: a", "completion": " short"}])
    write(tmp_path / "in/data/validation-00000-of-00001.parquet", [{"prompt": "POST: b", "completion": " brief"}])
    write(tmp_path / "in/data/test-00000-of-00001.parquet", [{"prompt": "POST: c", "completion": " no"}])
    given = ["--source", str(tmp_path / "in"), "--expect", "1", "--expect-held-out", "1"]
    tool.main(["tldr", str(tmp_path / "out"), *given])
    assert rows_of(tmp_path / "out" / "train.jsonl") == [{"prompt": [asked("POST: a")], "completion": " short"}]
    assert rows_of(tmp_path / "out" / "validation.jsonl") == [{"prompt": [asked("POST: b")], "completion": " brief"}]


def test_tldr_preferences_as_texts(tool, tmp_path):
    pair = {"prompt": "POST: a", "chosen": " x", "rejected": " y"}
    other = {**pair, "prompt": "POST: b"}
    write(tmp_path / "in" / "train.jsonl", [pair])
    write(tmp_path / "in" / "validation.jsonl", [other])
    given = ["--source", str(tmp_path / "in"), "--expect", "1", "--expect-held-out", "1"]
    tool.main(["tldr-preference", str(tmp_path / "out"), *given])
    assert rows_of(tmp_path / "out" / "train.jsonl") == [{**pair, "prompt": [asked("POST: a")]}]


def test_comparisons_of_summaries_become_pairs(tool, tmp_path):
    train = [comparison("p", 1), comparison(None, 0, article="A"), comparison("", 0)]
    write(tmp_path / "in/comparisons/train/0000.jsonl", train)
    write(tmp_path / "in/comparisons/validation/0000.jsonl", [comparison("r", 0)])
    given = ["--source", str(tmp_path / "in"), "--expect", "3", "--expect-held-out", "1"]
    tool.main(["summarize-from-feedback", str(tmp_path / "out"), *given])
    post = "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: p\n\nTL;DR:"
    assert rows_of(tmp_path / "out" / "train.jsonl") == [
        {"prompt": [asked(post)], "chosen": " two", "rejected": " one"},
        {"prompt": [asked("TITLE: T\n\nA\n\nTL;DR:")], "chosen": " one", "rejected": " two"},
    ]
    assert dropped(tmp_path / "out", "train.jsonl") == {"empty text": 1}


def test_published_counts_are_expected_unless_others_are_named(tool, tmp_path, caplog):
    write(tmp_path / "in" / "train.jsonl", [ultrafeedback("a")])
    write(tmp_path / "in" / "test.jsonl", [ultrafeedback("b")])
    given = ["ultrafeedback", str(tmp_path / "out"), "--source", str(tmp_path / "in")]
    with pytest.raises(DataError, match=r"train_prefs has 1 rows here, 61,135 are expected.*--expect 1 or --allow"):
        tool.main(given)
    with pytest.raises(DataError, match=r"test_prefs has 1 rows here, 2,000 are expected.*--expect-held-out 1 or"):
        tool.main([*given, "--expect", "1"])
    assert not list((tmp_path / "out").iterdir())
    tool.main([*given, "--expect", "1", "--allow-count"])
    assert "the split test_prefs has 1 rows here" in caplog.text
    assert (tmp_path / "out" / "summary.json").is_file()


def test_held_out_rows_are_taken_from_training_by_prompt(tool, tmp_path):
    train = [ultrafeedback(f"p{at % 10}", chosen=f"good {at}") for at in range(30)]
    given = ["ultrafeedback", str(tmp_path / "out"), *source(tmp_path / "in", train)]
    with pytest.raises(DataError, match=r"no held-out split in it; add --held-out N"):
        tool.main(given)
    tool.main([*given, "--held-out", "7"])
    kept, held_out = (rows_of(tmp_path / "out" / name) for name in ("train.jsonl", "validation.jsonl"))
    assert (len(kept), len(held_out)) == (21, 9)  # whole prompts, three rows each
    assert not {str(row["prompt"]) for row in kept} & {str(row["prompt"]) for row in held_out}
    first = (tmp_path / "out" / "validation.jsonl").read_bytes()
    tool.main([*given, "--held-out", "7"])
    assert (tmp_path / "out" / "validation.jsonl").read_bytes() == first


def test_part_of_a_held_out_split(tool, tmp_path):
    given = source(tmp_path / "in", [ultrafeedback("a")], [ultrafeedback(f"p{at}") for at in range(20)])
    tool.main(["ultrafeedback", str(tmp_path / "out"), *given, "--held-out", "5"])
    assert len(rows_of(tmp_path / "out" / "validation.jsonl")) == 5
    assert dropped(tmp_path / "out", "validation.jsonl") == {"not drawn": 15}


@pytest.mark.parametrize(
    ("dataset", "train", "more", "match"),
    [
        ("ultrafeedback", [{"question": "a", "answer": "b"}], [], r"no response in its fields .*1 of 1 rows"),
        ("ultrafeedback", [{"messages": [asked("a"), said("b")]}], [], r"one response, not a pair"),
        ("ultrachat", [ultrafeedback("a")], [], r"a pair of responses, not one"),
        ("summarize-from-feedback", [{**comparison("p", 0), "choice": 2}], [], r"choice isn't 0 or 1"),
        ("ultrafeedback", [ultrafeedback("a", chosen="")], [], r"train: no row is left of 1 \(empty text: 1\)"),
        ("ultrafeedback", [ultrafeedback("a")], ["--held-out", "0"], r"--held-out 0: at least 1"),
        ("ultrafeedback", [ultrafeedback("a")], ["--held-out", "2"], r"--held-out 2: only 1 rows"),
        ("ultrafeedback", [ultrafeedback("a")], [], r"train: no row is left of 1 \(all held out\)"),
    ],
)
def test_what_cannot_be_prepared_is_refused(tool, tmp_path, dataset, train, more, match):
    write(tmp_path / "in" / "train.jsonl", train)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("kept\n")
    given = ["--source", str(tmp_path / "in"), "--expect", "1", *(more or ["--held-out", "1"])]
    with pytest.raises(DataError, match=match) as caught:
        tool.main([dataset, str(tmp_path / "out"), *given])
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.jsonl"]
    assert (tmp_path / "out" / "train.jsonl").read_text() == "kept\n"


def test_a_few_unreadable_rows_are_left_out(tool, tmp_path, caplog):
    train = [ultrafeedback(f"p{at}") for at in range(199)]
    train.insert(7, {**ultrafeedback("x"), "rejected": [asked("y"), said("bad")]})
    tool.main(["ultrafeedback", str(tmp_path / "out"), *source(tmp_path / "in", train, [ultrafeedback("z")])])
    assert dropped(tmp_path / "out", "train.jsonl") == {"unreadable row": 1}
    assert f"left out: {tmp_path}/in/train.jsonl:8: prompt 'x' isn't the one that rejected begins with" in caplog.text


def test_folder_without_a_training_split_is_refused(tool, tmp_path):
    write(tmp_path / "in" / "test.jsonl", [ultrafeedback("a")])
    with pytest.raises(DataError, match=r"no training split in it; give .* train_prefs.jsonl or train.jsonl"):
        tool.main(["ultrafeedback", str(tmp_path / "out"), "--source", str(tmp_path / "in")])


def test_hub_names(tool, monkeypatch):
    """Which data set of the hub is asked for which split; nothing is downloaded."""
    from preparing import datasets as table

    opened: list[tuple[str, str | None]] = []
    monkeypatch.setattr(table, "open_rows", lambda found, _: opened.append((found.hub_name, found.split)))
    monkeypatch.setattr(table, "load_dataset", lambda kind, data_files, split: opened.append((data_files, split)))
    chosen = table.DATASETS["ultrachat"]
    table.open_split(chosen, chosen.held_out, None, Path("scratch"))
    table.open_split(chosen, chosen.train, "me/mine", Path("scratch"))
    copied = table.DATASETS["summarize-from-feedback"]
    table.open_split(copied, copied.train, None, Path("scratch"))
    files = "hf://datasets/openai/summarize_from_feedback@refs%2Fconvert%2Fparquet/comparisons/train/*.parquet"
    assert opened == [
        ("HuggingFaceH4/ultrachat_200k", "test_sft"),
        ("me/mine", "train_sft"),
        (files, "train"),
    ]


def test_the_users_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(TOOLS / "prepare_data.py"), "ultrafeedback", str(tmp_path / "out")]
    result = subprocess.run(
        [*command, "--source", str(tmp_path / "no.jsonl")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("aligndistil: error: ")
    assert "no.jsonl" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
