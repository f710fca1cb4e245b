"""Tiny models, and Megatron checkpoints of them, to be spoiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny
from tests.unit.checkpoint.refusals import to_megatron


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny(folder, name) for name in ("llama-tied", "qwen2-untied")}


@pytest.fixture
def model(models, tmp_path):
    """A fresh copy of a tied Llama."""
    return Path(shutil.copytree(models["llama-tied"], tmp_path / "model"))


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("checkpoints") / "llama-tied"
    run_ranks(1, to_megatron, models["llama-tied"], output)
    return output


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """A fresh copy of a Megatron checkpoint."""
    return Path(shutil.copytree(checkpoints, tmp_path / "checkpoint"))
