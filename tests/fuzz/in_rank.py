"""Fuzzing of what needs process groups: module-level functions for the harness's ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from megatron_aligndistil.checkpoint import locate
from megatron_aligndistil.checkpoint.adapter_config import PEFT_CONFIG, PEFT_WEIGHTS
from megatron_aligndistil.checkpoint.weights import load_weights
from megatron_aligndistil.models.policy import HiddenStateModel, ModelSettings, build_chunks
from megatron_aligndistil.parallel.setup import Layout, initialize
from tests.fuzz import training
from tests.fuzz.mutations import junk, spoiled_bytes, spoiled_text_file
from tests.fuzz.reader import Reader, Tally

Edit = tuple[str, bytes]  # a file's name in its folder, and its new content


def model_of(path: Path) -> list[HiddenStateModel]:
    architecture = locate.read_architecture(path)
    return build_chunks(architecture, ModelSettings(Layout(), torch.float32, 64, 128, False))


def fuzz_peft(adapter: Path, copy: Path) -> Tally:
    """Adapters over a sound base: config and weights are spoiled."""
    initialize(Layout(), 0, "cpu")
    reader = Reader("PEFT folders")
    sound = json.loads((adapter / PEFT_CONFIG).read_text())
    weights = (adapter / PEFT_WEIGHTS).read_bytes()
    one_key = st.tuples(st.sampled_from(sorted([*sound, "use_dora", "use_rslora", "rank_pattern"])), junk()).map(
        lambda drawn: json.dumps({**sound, drawn[0]: drawn[1]}).encode()
    )
    configs = st.tuples(st.just(PEFT_CONFIG), spoiled_text_file([sound]) | one_key)
    tensors = st.tuples(st.just(PEFT_WEIGHTS), spoiled_bytes([weights], 600))

    def check(edit: Edit) -> None:
        shutil.copytree(adapter, copy)
        (copy / edit[0]).write_bytes(edit[1])
        try:
            # The base's own folder has another name, and an adapter may name any.
            reader.read(lambda: locate.saved_adapter(copy) and load_weights(model_of(copy), copy), copy)
        finally:
            shutil.rmtree(copy)

    return reader.fuzz(configs | tensors, check)


def fuzz_checkpoint(checkpoint: Path, copy: Path) -> Tally:
    """Weights of a checkpoint of which any file is spoiled, and not compared with its manifest."""
    initialize(Layout(), 0, "cpu")
    chunks, reader = model_of(checkpoint), Reader("checkpoint folders")
    shutil.copytree(checkpoint, copy)

    def check(edit: Edit) -> None:
        sound = (checkpoint / edit[0]).read_bytes()
        (copy / edit[0]).write_bytes(edit[1])
        reader.read(lambda: (locate.read_architecture(copy), load_weights(chunks, copy)), copy)
        (copy / edit[0]).write_bytes(sound)

    return reader.fuzz(edits(checkpoint, "weights/*"), check)


def fuzz_resuming(folder: Path, copy: Path) -> Tally:
    """Runs that go on from a spoiled checkpoint, which they are told not to compare with its manifest."""
    reader = Reader("resuming")
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    own = copy / "run" / "checkpoints" / checkpoint.name
    given = [
        *training.overrides(folder / "model", folder / "pairs.jsonl", copy, steps=3),
        "exp_manager.resume_if_exists=true",
        "exp_manager.create_tensorboard_logger=false",
        "exp_manager.checkpoint_callback_params.verify_on_load=false",
        "exp_manager.checkpoint_callback_params.save_on_train_end=false",
    ]
    spoiled_metrics = edits(folder / "run", "metrics.jsonl")
    spoiled_states = edits(folder / "run", f"checkpoints/{checkpoint.name}/state.json")
    spoiled_weights = edits(folder / "run", f"checkpoints/{checkpoint.name}/weights/*")

    def check(edit: Edit) -> None:
        shutil.copytree(folder / "run", copy / "run")
        (copy / "run" / edit[0]).write_bytes(edit[1])
        try:
            reader.read(lambda: training.train("sft", given), copy)
            assert not list(own.parent.glob(".step_*"))
        finally:
            shutil.rmtree(copy / "run")

    return reader.fuzz(spoiled_metrics | spoiled_states | spoiled_weights, check)


def edits(folder: Path, pattern: str) -> SearchStrategy[Edit]:
    """Spoiled contents of the files of a folder."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern))}
    assert files

    def of(name: str) -> SearchStrategy[Edit]:
        damaged = spoiled_bytes([files[name]], 400) | spoiled_bytes([files[name]])
        values = spoiled_text_file([json.loads(files[name])]) if name.endswith(".json") else st.nothing()
        return st.tuples(st.just(name), damaged | values)

    return st.sampled_from(sorted(files)).flatmap(of)
