"""From files to examples: summary, cache, coordination of processes, and what cannot be used."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from megatron_aligndistil.config.base_schema import DataConfig
from megatron_aligndistil.data.chat import ChatFormat
from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.data.examples import Coordination, load_examples
from megatron_aligndistil.data.sampler import validation_batches
from megatron_aligndistil.data.transforms import swap_pair
from megatron_aligndistil.errors import ConfigError, DataError
from tests.unit.data.conftest import WriteJsonl, pair_row

Make = Callable[..., DataConfig]
ROWS = [pair_row(f"Question {i}?", f"good {i} " * (i + 1), f"bad {i}") for i in range(6)]


def only_cache(config: DataConfig) -> Path:
    assert config.cache_dir is not None
    (folder,) = Path(config.cache_dir).iterdir()  # scratch folders are gone too
    return folder


def test_preferences(qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make) -> None:
    path = write_jsonl(*ROWS)
    examples, summary = load_examples(data_config(path), "train", "preference", qwen, 2048)
    assert len(examples) == 6 and [e.origin for e in examples] == [f"{path}:{i + 1}" for i in range(6)]
    for example, row in zip(examples, ROWS, strict=True):
        for sequence, side in zip(example.sequences, ("chosen", "rejected"), strict=True):
            assert sequence.tokens.dtype == np.int32
            response = qwen.decode(sequence.tokens[sequence.prompt_length :])
            assert response == row[side][1]["content"] + "<|im_end|>"
            assert row["prompt"] in qwen.decode(sequence.tokens[: sequence.prompt_length])
    assert summary.rows == summary.kept == 6 and summary.truncated == 0 and summary.dropped == {}
    assert summary.tokens == sum(e.length for e in examples)
    assert summary.max_length == max(e.length for e in examples)
    assert summary.response_tokens == sum(s.length - s.prompt_length for e in examples for s in e.sequences)


def test_indexing_agrees_with_iteration(
    qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make
) -> None:
    examples, _ = load_examples(data_config(write_jsonl(*ROWS)), "train", "preference", qwen, 2048)
    wanted = np.array([4, 0, 4])
    for got, index in zip(examples[wanted], wanted, strict=True):
        one = examples[int(index)]
        assert got.origin == one.origin
        assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(got.sequences, one.sequences, strict=True))


def test_swapped_pairs_share_the_data_on_disk(
    qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make
) -> None:
    config = data_config(write_jsonl(*ROWS))
    straight, _ = load_examples(config, "train", "preference", qwen, 2048)
    swapped, _ = load_examples(config, "train", "preference", qwen, 2048, swap_pair)
    only_cache(config)
    for one, other in zip(straight, swapped, strict=True):
        assert np.array_equal(one.sequences[0].tokens, other.sequences[1].tokens)
        assert np.array_equal(one.sequences[1].tokens, other.sequences[0].tokens)


@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_validation_sees_every_example_once(
    data_size: int, qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make
) -> None:
    """Six examples in global batches of four: the last batch of two leaves a third rank without any."""
    examples, _ = load_examples(data_config(write_jsonl(*ROWS)), "train", "preference", qwen, 2048)
    how = MicroBatching("packed", 1, 4096)
    batches = list(validation_batches(examples, 4))
    assert [len(batch) for batch in batches] == [4, 2]
    shares = [micro_batches(batch, rank, data_size, how) for batch in batches for rank in range(data_size)]
    seen = [origin for share in shares for micro_batch in share for origin in micro_batch.origins]
    assert sorted(seen) == sorted(e.origin for e in examples)
    assert (data_size == 3) == ([] in shares)


def test_both_responses_as_demonstrations(
    qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make
) -> None:
    config = data_config(write_jsonl(*ROWS), responses="both")
    examples, summary = load_examples(config, "train", "demonstration", qwen, 2048)
    assert len(examples) == 12 and summary.rows == 6 and summary.kept == 12
    assert all(len(example.sequences) == 1 for example in examples)


def test_labels_come_with_their_responses(
    qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make
) -> None:
    """Dropped rows in between don't shift them, and they are part of the fingerprint."""
    rows = [{"prompt": f"Question {i}?", "completion": f"answer {i}", "label": i % 3 == 0} for i in range(6)]
    rows[2]["prompt"] = "long " * 80
    config = data_config(write_jsonl(*rows, ROWS[0]), max_prompt_length=60)
    examples, summary = load_examples(config, "train", "unpaired", qwen, 2048)
    assert (summary.rows, summary.kept) == (7, 7)
    seen = [(qwen.decode(e.sequences[0].tokens[e.sequences[0].prompt_length :]), e.desirable) for e in examples]
    expected = [(row["completion"], row["label"]) for row in rows if row is not rows[2]]
    expected += [(ROWS[0]["chosen"][1]["content"], True), (ROWS[0]["rejected"][1]["content"], False)]
    assert seen == [(f"{text}<|im_end|>", label) for text, label in expected]

    turned = [{**row, "label": not row["label"]} for row in rows]
    other, _ = load_examples(
        data_config(write_jsonl(*turned, ROWS[0], name="other.jsonl"), max_prompt_length=60),
        "train",
        "unpaired",
        qwen,
        2048,
    )
    assert other.fingerprint != examples.fingerprint
    assert [e.desirable for e in other][:5] == [not e.desirable for e in examples][:5]


def test_the_second_load_does_not_tokenize(
    qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = data_config(write_jsonl(*ROWS))
    first, summary = load_examples(config, "train", "preference", qwen, 2048)
    tokenized = []
    count = ChatFormat.token_ids
    monkeypatch.setattr(ChatFormat, "token_ids", lambda self, texts: tokenized.append(texts) or count(self, texts))
    second, again = load_examples(config, "train", "preference", qwen, 2048)
    assert tokenized == [] and again == summary
    assert [e.origin for e in first] == [e.origin for e in second]
    load_examples(config, "train", "preference", qwen, 1024)
    assert len(tokenized) == 2  # the counter does count: prompts, then whole conversations


def test_a_fingerprint_is_of_the_tokens(
    base_tokenizer: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make
) -> None:
    """Not of where the file lies, but of every token and of where a response begins."""
    base_tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[1]['content'] if messages[1:] }}"
    files = {
        "a": [pair_row("xy", "zz", "b"), pair_row("q", "r", "s")],
        "same": [pair_row("xy", "zz", "b"), pair_row("q", "r", "s")],
        "border": [pair_row("x", "yzz", "b"), pair_row("q", "r", "s")],
        "order": [pair_row("q", "r", "s"), pair_row("xy", "zz", "b")],
        "swapped": [pair_row("xy", "b", "zz"), pair_row("q", "r", "s")],
    }
    found = {}
    for name, rows in files.items():
        config = data_config(write_jsonl(*rows, name=f"{name}.jsonl"))
        found[name] = load_examples(config, "train", "preference", base_tokenizer, 99)[0].fingerprint
    assert found["a"] == found["same"] and len(set(found.values())) == 4


def changed_row(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    path = Path(config.data_prefix.train[0])
    path.write_text(path.read_text().replace("good 0", "fine 0"))
    return {}


def changed_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    tokenizer.chat_template = tokenizer.chat_template.replace("user: ", "U: ")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        changed_row,
        changed_template,
        lambda config, tokenizer: setattr(config, "max_prompt_length", 99) or {},
        lambda config, tokenizer: setattr(config, "long_prompt", "truncate_left") or {},
        lambda config, tokenizer: {"encoder_seq_length": 512},
        lambda config, tokenizer: {"kind": "demonstration"},
    ],
)
def test_what_the_cache_depends_on(
    change: Callable[..., dict[str, Any]],
    base_tokenizer: PreTrainedTokenizerBase,
    write_jsonl: WriteJsonl,
    data_config: Make,
) -> None:
    base_tokenizer.chat_template = "user: {{ messages[0]['content'] }}\n{{ messages[1]['content'] if messages[1:] }}"
    config = data_config(write_jsonl(*ROWS))
    arguments: dict[str, Any] = {"kind": "preference", "encoder_seq_length": 2048}
    load_examples(config, "train", tokenizer=base_tokenizer, **arguments)
    arguments |= change(config, base_tokenizer)
    load_examples(config, "train", tokenizer=base_tokenizer, **arguments)
    assert config.cache_dir is not None and len(list(Path(config.cache_dir).iterdir())) == 2


def test_limits_are_counted(qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make) -> None:
    rows = [pair_row("short", "a", "b"), pair_row("long " * 80, "a", "b"), pair_row("short", "many words " * 80, "b")]
    config = data_config(write_jsonl(*rows), max_prompt_length=60)
    examples, summary = load_examples(config, "train", "preference", qwen, 100)
    assert (summary.rows, summary.kept, summary.truncated) == (3, 2, 1)
    assert summary.dropped == {"prompt over 60 tokens": 1}
    assert max(s.length for e in examples for s in e.sequences) == 100
    assert "3 rows, 2 examples kept, 1 of them truncated, 1 dropped (prompt over 60 tokens: 1)" in summary.line()
    cut = examples[1].sequences[0]
    assert cut.tokens[-1] != qwen.eos_token_id and examples[1].sequences[1].tokens[-1] == qwen.eos_token_id


def test_no_example_left(qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make) -> None:
    path = write_jsonl(*ROWS)
    said = f"{path}: no example is left of 6 rows, 6 dropped (prompt over 3 tokens: 6)"
    with pytest.raises(DataError) as caught:
        load_examples(data_config(path, max_prompt_length=3), "train", "preference", qwen, 2048)
    assert said in str(caught.value)


def test_no_source(qwen: PreTrainedTokenizerBase, data_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"model\.data\.data_prefix\.train is empty"):
        load_examples(data_config(), "train", "preference", qwen, 2048)


def test_pack_length_below_the_longest_example(
    qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make
) -> None:
    config = data_config(write_jsonl(*ROWS), batching="packed", pack_length=50)
    with pytest.raises(ConfigError, match=r"model\.data\.pack_length=50 is below the longest example .*, \d+ tokens"):
        load_examples(config, "train", "preference", qwen, 2048)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_defect_in_the_middle_leaves_nothing_behind(
    workers: int, base_tokenizer: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make
) -> None:
    base_tokenizer.chat_template = "{{ messages[0]['content'] }}\n{{ messages[1]['content'] if messages[1:] }}"
    rows = [ROWS[i % 6] for i in range(300)]
    good = write_jsonl(*rows, name="good.jsonl")
    examples, _ = load_examples(data_config(good, num_workers=workers), "train", "preference", base_tokenizer, 2048)
    assert [e.origin for e in examples] == [f"{good}:{i + 1}" for i in range(300)]
    bad = write_jsonl(*rows[:270], pair_row("Why?", "", "b"), *rows[270:], name="bad.jsonl")
    config = data_config(bad, num_workers=workers)
    with pytest.raises(DataError, match=r"bad\.jsonl:271: chosen\[1\]\.content is empty"):
        load_examples(config, "train", "preference", base_tokenizer, 2048)
    only_cache(config)  # the good one's


def test_damaged_data_is_built_again(qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make) -> None:
    config = data_config(write_jsonl(*ROWS))
    expected = [e.origin for e in load_examples(config, "train", "preference", qwen, 2048)[0]]
    folder = only_cache(config)
    (arrow,) = folder.glob("*.arrow")
    for damage in (
        lambda: arrow.write_bytes(arrow.read_bytes()[:300]),
        lambda: (folder / "state.json").write_text("{"),
        lambda: (folder / "summary.json").write_text(json.dumps({"rows": 1})),
    ):
        damage()
        assert [e.origin for e in load_examples(config, "train", "preference", qwen, 2048)[0]] == expected


def test_others_wait_for_the_builder(qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make) -> None:
    """The one that waits finds the data after the barrier, which the builder reaches when they are complete."""
    config = data_config(write_jsonl(*ROWS))

    def build() -> None:
        load_examples(config, "train", "preference", qwen, 2048)

    waiting = Coordination(is_builder=False, barrier=build)
    examples, _ = load_examples(config, "train", "preference", qwen, 2048, coordination=waiting)
    assert len(examples) == 6


def test_a_failing_builder_still_reaches_the_barrier(
    qwen: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make
) -> None:
    config, reached = data_config(write_jsonl("broken")), []
    with pytest.raises(DataError, match="not valid JSON"):
        load_examples(
            config,
            "train",
            "preference",
            qwen,
            2048,
            coordination=Coordination(True, lambda: reached.append("builder")),
        )
    waiting = Coordination(False, lambda: reached.append("other"))
    with pytest.raises(DataError, match="wasn't built; see the error of the process that builds it"):
        load_examples(config, "train", "preference", qwen, 2048, coordination=waiting)
    assert reached == ["builder", "other"]


def test_a_cache_that_cannot_be_written(
    base_tokenizer: PreTrainedTokenizerBase, write_jsonl: WriteJsonl, data_config: Make, tmp_path: Path
) -> None:
    base_tokenizer.chat_template = "{{ messages[0]['content'] }}\n{{ messages[1]['content'] if messages[1:] }}"
    config = data_config(write_jsonl(*ROWS))
    (tmp_path / "file").write_text("")
    config.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory\); .*model\.data\.cache_dir"):
        load_examples(config, "train", "preference", base_tokenizer, 2048)
    config.cache_dir = str(tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # writing beyond fails as on a full disk
    try:
        with pytest.raises(DataError, match=r"cannot be written \(.*\); .*model\.data\.cache_dir"):
            load_examples(config, "train", "preference", base_tokenizer, 2048)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache").iterdir()) == []
