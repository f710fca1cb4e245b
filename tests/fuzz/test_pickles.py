"""A pickle in place of any file of ours, or beside it, is never run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from megatron_aligndistil.checkpoint.convert import ConvertRequest, convert
from megatron_aligndistil.parallel.setup import Layout, initialize
from tests.distributed.harness import run_ranks
from tests.fuzz import malicious, training
from tests.fuzz.malicious import FORMS, Folders
from tests.fuzz.models import write_peft
from tests.integration.program import write_model, write_pairs


def prepare(folders: Folders) -> None:
    training.train("sft", training.overrides(folders.model, folders.pairs.parent, folders.root))
    with training.own_groups():
        initialize(Layout(), 0, "cpu")
        convert(ConvertRequest(folders.model, folders.converted, verify=False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    root: Path = tmp_path_factory.mktemp("sound")
    (root / "data").mkdir()
    model, pairs = write_model(root / "model", seed=1), write_pairs(root / "data" / "pairs.jsonl", 8)
    made = Folders(root, model, pairs, root / "megatron", write_peft(model, root / "adapter"))
    run_ranks(1, prepare, made)
    return made


@pytest.mark.parametrize("form", FORMS)
def test_the_pickles_leave_a_mark_where_they_are_run(form, tmp_path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "file"
    file.write_bytes(FORMS[form](mark))
    if form == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert mark.is_dir()


def test_every_kind_of_file_is_attacked(folders) -> None:
    attacked = {(folder.name, Path(name).name) for folder, name, _ in malicious.cases(folders)}
    for name in (
        "common.pt",
        ".metadata",
        "__0_1.distcp",
        "state.json",
        "manifest.json",
        "metrics.jsonl",
        "config.yaml",
    ):
        assert ("run", name) in attacked
    for folder in (folders.model, folders.adapter, folders.converted, folders.root / "cache"):
        assert any(name == folder.name for name, _ in attacked)


@pytest.mark.parametrize("form", [None, *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS)])
def test_no_pickle_is_run(form, folders, tmp_path) -> None:
    [outcome] = run_ranks(1, malicious.attack, folders, tmp_path, form, timeout_seconds=1500)
    assert len(outcome.refused) >= 15, outcome
    assert outcome.ended >= 4, outcome  # what is beside a model, or is built anew
