"""Checkpoints and adapters: loaded, or one line that names the file. What needs process groups runs in a rank."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from megatron_aligndistil.checkpoint import index, locate, manifest
from megatron_aligndistil.checkpoint.resume import read_rollout
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.trainer.rollout_plan import CurrentRollout
from megatron_aligndistil.types import Example, Sequence
from tests.distributed.harness import run_ranks
from tests.fuzz import in_rank, training
from tests.fuzz.models import write_peft
from tests.fuzz.mutations import spoiled_bytes, spoiled_json, spoiled_text_file
from tests.fuzz.reader import Reader, Tally
from tests.integration.program import write_model, write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a model and a run of two steps over it."""
    folder = tmp_path_factory.mktemp("run")
    model, pairs = write_model(folder / "model", seed=1), write_pairs(folder / "pairs.jsonl", 8)
    run_ranks(1, training.train, "sft", training.overrides(model, pairs, folder, steps=2))
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder) -> Path:
    return locate.model_path(folder / "run")


def test_states(record, checkpoint, tmp_path) -> None:
    reader = Reader("state.json")
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    sound = json.loads((copy / "state.json").read_text())
    lora = {"rank": 2, "alpha": 4.0, "targets": ["mlp_fc1"], "base": str(tmp_path)}

    def check(content: bytes) -> None:
        (copy / "state.json").write_bytes(content)
        reader.read(lambda: (locate.read_state(copy), locate.saved_adapter(copy)), copy)

    record(reader.fuzz(spoiled_text_file([sound, {**sound, "lora": lora}]), check))


def test_manifests(record, checkpoint, tmp_path) -> None:
    reader = Reader("manifest.json")
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    sound = json.loads((copy / "manifest.json").read_text())
    digest = hashlib.sha256(b"").hexdigest()
    names = ("../run", "/dev/zero", "/proc/self/mem", "..", ".", "", "\x00", "a" * 5000, "weights", "weights/x")
    # Their own hash fits: whoever doctors one makes it fit.
    others = st.sampled_from(names).map(lambda name: {**sound["files"], name: {"bytes": 0, "sha256": digest}})
    doctored = (others | spoiled_json([sound["files"]]).map(_parsed)).map(
        lambda files: json.dumps({"format": 1, "sha256": digest_of(files), "files": files}).encode()
    )

    def check(content: bytes) -> None:
        (copy / "manifest.json").write_bytes(content)
        reader.read(lambda: _verify(copy), copy)

    record(reader.fuzz(spoiled_text_file([sound]) | doctored, check))


def _verify(checkpoint: Path) -> None:
    if complaint := manifest.damage(checkpoint):
        raise CheckpointError(complaint)


def digest_of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def test_rollouts(record, tmp_path) -> None:
    reader, file = Reader("rollout.safetensors"), tmp_path / "rollout.safetensors"
    prompts = [Example(f"x:{i}", (Sequence(np.arange(4 + i, dtype=np.int32), 2),), {}) for i in range(3)]
    examples = [Example(e.origin, e.sequences, {"value": np.ones(2 + i, np.float32)}) for i, e in enumerate(prompts)]
    state = CurrentRollout(1, 2, examples, {"kl": 0.5}).saved(unfinished=True)
    arrays, text = dict(state.arrays), json.loads(state.text)
    sound = save(arrays, metadata={"state": state.text})
    texts = spoiled_json([text]).map(lambda text: save(arrays, metadata={"state": text}))
    names = st.sampled_from(sorted(arrays))
    shorter = st.tuples(names, st.integers(0, 3)).map(
        lambda drawn: save({**arrays, drawn[0]: arrays[drawn[0]][: drawn[1]].copy()}, metadata={"state": state.text})
    )
    negative = names.map(lambda name: save({**arrays, name: -arrays[name]}, metadata={"state": state.text}))

    def check(content: bytes) -> None:
        file.write_bytes(content)
        reader.read(lambda: read_rollout(file, CurrentRollout.restored), file)

    record(reader.fuzz(spoiled_bytes([sound], len(sound) // 2) | texts | shorter | negative, check))
    file.write_bytes(sound)
    restored = read_rollout(file, CurrentRollout.restored)
    assert [example.origin for example in restored.examples] == ["x:0", "x:1", "x:2"]
    assert set(load_file(file)) == set(arrays)


def test_indices(record, checkpoint, tmp_path) -> None:
    reader, copy = Reader("checkpoint index"), tmp_path / "weights"
    shutil.copytree(checkpoint / "weights", copy)
    sound = (copy / ".metadata").read_bytes()
    whole = index.read_index(copy)
    old = pickle.dumps(whole, protocol=2)
    parts = [pickle.dumps(value) for value in (whole.storage_data, whole.planner_data, None, {}, whole.storage_meta)]

    def check(content: bytes) -> None:
        (copy / ".metadata").write_bytes(content)
        reader.read(lambda: (index.check_files(copy), index.stored_dtypes(copy)), copy)

    inputs = spoiled_bytes([sound]) | spoiled_bytes([old], 300) | st.sampled_from(parts) | st.binary(max_size=40)
    record(reader.fuzz(inputs, check))


@pytest.mark.parametrize("name", ["PEFT folders", "checkpoint folders", "resuming"])
def test_in_a_rank(record, folder, checkpoint, tmp_path, name) -> None:
    adapter = write_peft(folder / "model", tmp_path / "adapter")
    arguments = {
        "PEFT folders": (in_rank.fuzz_peft, adapter),
        "checkpoint folders": (in_rank.fuzz_checkpoint, checkpoint),
        "resuming": (in_rank.fuzz_resuming, folder),
    }
    function, path = arguments[name]
    [tally] = run_ranks(1, function, path, tmp_path / "copy", timeout_seconds=3000)
    assert isinstance(tally, Tally)
    record(tally)
