"""Distributed checkpoints that are incomplete, damaged or doctored: one line that names the file."""

from __future__ import annotations

import io
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_aligndistil.checkpoint import index, locate
from megatron_aligndistil.checkpoint.weights import load_weights
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.policy import ModelSettings, build_chunks
from megatron_aligndistil.parallel.setup import Layout, initialize
from tests.distributed.harness import run_ranks
from tests.unit.checkpoint.refusals import refusal


class Doctored:
    """Unpickling it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def load_error(path: Path, **changes: int) -> str:
    """What ``load_weights`` says about a checkpoint for a model of the original's architecture with ``changes``."""
    initialize(Layout(), seed=0, accelerator="cpu")
    architecture = replace(locate.read_architecture(path), **changes)
    chunks = build_chunks(architecture, ModelSettings(Layout(), torch.float32, 64, 128, False))
    try:
        load_weights(chunks, path)
    except CheckpointError as error:
        return str(error)
    return "no error"


def add_object(folder: Path, name: str, data: bytes) -> None:
    """Put ``data`` into a distributed checkpoint as the object ``name``."""
    whole = index.read_index(folder)
    file = next(folder.glob("*.distcp"))
    place = _StorageInfo(file.name, file.stat().st_size, len(data))
    file.write_bytes(file.read_bytes() + data)
    whole.state_dict_metadata[name] = BytesStorageMetadata()
    for key in [key for key in whole.storage_data if key.fqn == name]:
        del whole.storage_data[key]
    whole.storage_data[MetadataIndex(name)] = place
    (folder / ".metadata").write_bytes(pickle.dumps(whole))


class TestDistributedCheckpoint:
    def test_a_whole_one_passes(self, checkpoint):
        index.check_files(checkpoint / "weights")

    def test_a_truncated_file(self, checkpoint):
        file = next((checkpoint / "weights").glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-100])
        with refusal(file.name, "truncated"):
            index.check_files(checkpoint / "weights")

    @pytest.mark.parametrize("name", ["*.distcp", "common.pt", ".metadata", "metadata.json"])
    def test_a_missing_file(self, checkpoint, name):
        file = next((checkpoint / "weights").glob(name), None)
        if file is None:
            pytest.skip(f"this version of Megatron-Core writes no {name}")
        file.unlink()
        with refusal(file.name, "no such file"):
            index.check_files(checkpoint / "weights")

    @pytest.mark.parametrize("data", [b"", b"\x80\x04", b"nonsense", pickle.dumps(3), struct.pack("<Q", 2**60)])
    def test_a_damaged_index(self, checkpoint, data):
        (checkpoint / "weights" / ".metadata").write_bytes(data)
        with refusal(".metadata", "not a checkpoint's index"):
            index.check_files(checkpoint / "weights")

    def test_a_doctored_index_is_not_run(self, checkpoint, tmp_path):
        witness = tmp_path / "witness"
        (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(Doctored(witness)))
        with refusal(".metadata", "has no place there"):
            index.check_files(checkpoint / "weights")
        assert not witness.exists()

    def test_a_doctored_common_file_is_not_run(self, checkpoint, tmp_path):
        witness = tmp_path / "witness"
        torch.save({"x": Doctored(witness)}, checkpoint / "weights" / "common.pt")
        [error] = run_ranks(1, load_error, checkpoint)
        assert "cannot read the checkpoint" in error and str(checkpoint) in error and "\n" not in error
        assert not witness.exists()

    def test_a_doctored_object_is_not_run(self, checkpoint, tmp_path):
        """Newer Megatron-Core reads what isn't tensors from an object among the tensors, by plain unpickling."""
        folder, witness, doctored = checkpoint / "weights", tmp_path / "witness", io.BytesIO()
        torch.save([{"x": Doctored(witness)}], doctored)
        add_object(folder, "common_state/shard_0_1", doctored.getvalue())
        (folder / "common.pt").unlink(missing_ok=True)
        with refusal("0_0.distcp", "common_state", "not plain values"):
            index.check_files(folder)
        [error] = run_ranks(1, load_error, checkpoint)
        assert "not plain values" in error and "\n" not in error
        assert not witness.exists()

    def test_an_index_that_points_elsewhere(self, checkpoint):
        whole = index.read_index(checkpoint / "weights")
        next(iter(whole.storage_data.values())).relative_path = "../weights/__0_0.distcp"
        (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(whole))
        with refusal(".metadata", "../weights/__0_0.distcp"):
            index.check_files(checkpoint / "weights")

    def test_another_model_than_the_one_it_holds(self, checkpoint):
        [error] = run_ranks(1, _errors, checkpoint)
        assert "decoder.layers.4" in error["num_layers"] and "\n" not in error["num_layers"]
        assert "shape" in error["ffn_hidden_size"].lower() and "linear_fc" in error["ffn_hidden_size"]


def _errors(checkpoint: Path) -> dict[str, str]:
    from megatron.core import parallel_state

    found = {}
    for name, value in {"num_layers": 5, "ffn_hidden_size": 64}.items():
        found[name] = load_error(checkpoint, **{name: value})
        parallel_state.destroy_model_parallel()
    return found
