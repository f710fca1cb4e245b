"""What a refusal looks like: one line that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_aligndistil.checkpoint.convert import ConvertRequest, convert
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.parallel.setup import Layout, initialize


def to_megatron(source: Path, output: Path) -> None:
    initialize(Layout(), seed=0, accelerator="cpu")
    convert(ConvertRequest(source, output, verify=False))


def refusal(*named: str):
    """Expects a CheckpointError of one line that holds every one of ``named``, in order."""
    return pytest.raises(CheckpointError, match=r"(?s)\A[^\n]*" + r"[^\n]*".join(map(_escape, named)) + r"[^\n]*\Z")


def _escape(text: str) -> str:
    return "".join(c if c.isalnum() or c in " _" else "\\" + c for c in text)
