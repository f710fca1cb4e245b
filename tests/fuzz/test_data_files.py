"""Files of rows, tokenized data on disk and tokenizer folders: examples, or one line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from megatron_aligndistil.config.base_schema import DataConfig, DataPrefixConfig
from megatron_aligndistil.data.examples import load_examples
from megatron_aligndistil.data.tokenizer import load_tokenizer, rendering_fingerprint, tokenizer_fingerprint
from tests.fuzz.mutations import spoiled_bytes, spoiled_text_file
from tests.fuzz.reader import Reader
from tests.integration.program import write_model, write_pairs

HEAD = 400  # bytes where Parquet and Arrow keep lengths, beside their ends


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", seed=1)


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(str(model))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 6)


def load(path: Path, cache: Path, tokenizer) -> list:
    """Every example of a file, by way of the tokenized data in ``cache``."""
    data = DataConfig(
        data_prefix=DataPrefixConfig(train=[str(path)]), cache_dir=str(cache), max_prompt_length=32, num_workers=1
    )
    examples, _ = load_examples(data, "train", "preference", tokenizer, 64)
    return examples[range(len(examples))]


def shown(examples: list) -> list:
    return [(example.origin, [sequence.tokens.tolist() for sequence in example.sequences]) for example in examples]


def parquet(folder: Path, **columns: list) -> bytes:
    path = folder / "sound.parquet"
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


def test_files_of_rows(record, tokenizer, pairs, tmp_path) -> None:
    reader, cache = Reader("JSONL and Parquet files"), tmp_path / "cache"
    text = pairs.read_bytes()
    rows = [json.loads(line) for line in text.splitlines()]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    turns = {"prompt": columns["prompt"], **{n: [[{"role": "assistant", "content": "x"}]] * 6 for n in ("chosen", "a")}}
    sound = [
        parquet(tmp_path, **columns),
        parquet(tmp_path, **turns, rejected=[1] * 6),
        parquet(tmp_path, chosen=[None] * 6, rejected=[b"\xff"] * 6),
    ]
    lines = [text, b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"), text[:-40], text.replace(b"\n", b"\n\n")]
    jsonl = st.tuples(st.just(".jsonl"), spoiled_bytes(lines) | spoiled_text_file(rows) | st.sampled_from(lines))
    tables = st.tuples(st.just(".parquet"), spoiled_bytes(sound) | st.sampled_from([*sound, b"PAR1", b"PAR1PAR1"]))

    def check(drawn: tuple[str, bytes]) -> None:
        path = tmp_path / f"spoiled{drawn[0]}"
        path.write_bytes(drawn[1])
        reader.read(lambda: load(path, cache, tokenizer), "spoiled")
        assert all(entry.name.startswith("tokenized-") for entry in cache.iterdir()), "half-written data is left"
        shutil.rmtree(cache)

    cache.mkdir()
    record(reader.fuzz(jsonl | tables, lambda drawn: (cache.mkdir(exist_ok=True), check(drawn))))


def test_tokenized_cache(record, tokenizer, pairs, tmp_path) -> None:
    """A damaged cache is built anew: what is read is what a whole one holds."""
    reader, cache = Reader("tokenized cache"), tmp_path / "cache"
    expected = shown(load(pairs, cache, tokenizer))
    (folder,) = cache.iterdir()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files) >= 4
    edits = st.sampled_from(sorted(files)).flatmap(
        lambda name: st.tuples(
            st.just(name),
            (spoiled_text_file([json.loads(files[name])]) if name.endswith(".json") else st.nothing())
            | spoiled_bytes([files[name]], HEAD),
        )
    )

    def check(drawn: tuple[str, bytes]) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / drawn[0]).write_bytes(drawn[1])
        found = reader.read(lambda: load(pairs, cache, tokenizer), "cache", "tokenized-")
        assert shown(found) == expected
        assert all(entry.name.startswith("tokenized-") for entry in cache.iterdir()), "half-written data is left"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    record(reader.fuzz(edits, check))


def test_tokenizer_folders(record, model, tmp_path) -> None:
    reader, folder = Reader("tokenizer folders"), tmp_path / "model"
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
    files = {name: (model / name).read_bytes() for name in names}
    own_code = {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}
    config = json.loads(files["tokenizer_config.json"])
    edits = st.sampled_from(names).flatmap(
        lambda name: st.tuples(
            st.just(name),
            spoiled_bytes([files[name]])
            | (spoiled_text_file([json.loads(files[name])]) if name.endswith("json") else st.binary(max_size=20)),
        )
    )
    remote = st.just(("tokenizer_config.json", json.dumps({**config, **own_code}).encode()))

    def check(drawn: tuple[str, bytes]) -> None:
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / drawn[0]).write_bytes(drawn[1])
        try:
            reader.read(lambda: _fingerprints(folder), "model")
        finally:
            shutil.rmtree(folder)

    record(reader.fuzz(edits | remote, check))


def _fingerprints(folder: Path) -> tuple[str, str]:
    tokenizer = load_tokenizer(str(folder))
    return tokenizer_fingerprint(tokenizer), rendering_fingerprint(tokenizer)


def test_a_tokenizer_runs_no_code_of_its_folder(model, tmp_path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\nclass Own: ...\n")
    assert load_tokenizer(str(folder)).get_vocab().items() <= load_tokenizer(str(model)).get_vocab().items()
    assert not (tmp_path / "marker").exists()
