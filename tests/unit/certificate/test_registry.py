"""Nothing is without a check: every algorithm of the table, every public kernel."""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest
import torch

from megatron_aligndistil import kernels
from megatron_aligndistil.algorithms.table import ALGORITHMS
from megatron_aligndistil.certificate import formulas
from megatron_aligndistil.certificate.algorithms import ALGORITHM_CHECKS
from megatron_aligndistil.certificate.kernels import KERNELS
from megatron_aligndistil.certificate.models import World, architecture_for
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.config.certify import CertifyConfig
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.parallel.setup import Layout


def test_every_algorithm_has_a_check() -> None:
    assert {check.algorithm for check in ALGORITHM_CHECKS.values()} == set(ALGORITHMS)


@pytest.mark.parametrize("op", ["token_logprob", "token_kl", "extrapolated_kl"])
def test_every_public_kernel_has_a_check(op: str) -> None:
    module = importlib.import_module(f"{kernels.__name__}.{op}")
    functions = {name for name in module.__all__ if name.islower()}
    assert functions
    assert functions <= {name.split()[0] for name in KERNELS}


@pytest.mark.parametrize("name", ALGORITHM_CHECKS)
def test_a_checks_settings_are_keys_of_its_algorithm(name: str) -> None:
    config: Any = ALGORITHM_CHECKS[name].config(KernelConfig())
    assert config.algorithm == ALGORITHM_CHECKS[name].algorithm
    for key, value in ALGORITHM_CHECKS[name].settings.items():
        section, _, leaf = key.partition(".")
        assert getattr(getattr(config.model, section), leaf) == value


def test_the_keys_of_certify_are_a_runs() -> None:
    def compare(own: type, runs: type, path: str) -> None:
        hints, of_runs = get_type_hints(own), get_type_hints(runs)
        for field in fields(own):
            assert field.name in of_runs, f"{path}{field.name}"
            mine, theirs = hints[field.name], of_runs[field.name]
            if is_dataclass(mine):
                compare(mine, theirs, f"{path}{field.name}.")
            else:
                assert mine in (theirs, theirs | None), f"{path}{field.name}"

    compare(CertifyConfig, RunConfig, "")


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=3), Layout(tensor=8), Layout(pipeline=4, virtual_pipeline=2)]
)
def test_the_models_suit_the_layout(layout: Layout) -> None:
    a = architecture_for(layout, tied=True)
    for size in (a.num_query_groups, a.num_attention_heads, a.ffn_hidden_size, a.hidden_size):
        assert size % layout.tensor == 0
    assert a.num_layers % (layout.pipeline * (layout.virtual_pipeline or 1)) == 0
    assert a.vocab_size % layout.tensor or layout.tensor == 1


def test_every_rank_makes_the_same_world() -> None:
    one, two = (World(architecture_for(Layout(), tied=False)) for _ in range(2))
    assert all(torch.equal(one.weights("dpo")[name], weight) for name, weight in two.weights("dpo").items())
    assert not torch.equal(one.weights("dpo")["lm_head.weight"], one.weights("reverse")["lm_head.weight"])
    assert [s.tokens.tolist() for e in one.pairs for s in e.sequences] == [
        s.tokens.tolist() for e in two.pairs for s in e.sequences
    ]


def test_formulas_by_hand() -> None:
    """π = (1/2, 1/4, 1/4), π' = (1/4, 1/4, 1/2)."""
    p_TV = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log() + 3
    q_TV = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log() - 1
    log2 = torch.tensor([2.0], dtype=torch.float64).log()
    assert torch.allclose(formulas.label_logprob(p_TV, torch.tensor([1])), -2 * log2)
    assert torch.allclose(formulas.entropy(p_TV), 1.5 * log2)
    assert torch.allclose(formulas.kl(p_TV, q_TV), 0.25 * log2)
    assert torch.allclose(formulas.total_variation(p_TV, q_TV), torch.tensor([0.25], dtype=torch.float64))
    assert torch.allclose(formulas.expected_gap(p_TV, p_TV, q_TV), 0.25 * log2)
    # α = 1: π²/π' = (1, 1/4, 1/8), whose sum is 11/8.
    alpha_T = torch.ones(1, dtype=torch.float64)
    target_TV = formulas.extrapolated(p_TV, p_TV, q_TV, alpha_T).softmax(-1)
    assert torch.allclose(target_TV, torch.tensor([[8, 2, 1]], dtype=torch.float64) / 11)
    assert torch.allclose(formulas.log_z_star(p_TV, q_TV, alpha_T).exp(), alpha_T * 11 / 8)
    tvd_T = torch.tensor([0.25], dtype=torch.float64)
    assert float(formulas.token_alpha(True, 20.0, 0.5, 2.0, tvd_T)) == 10.5
    assert float(formulas.token_alpha(False, 20.0, 0.5, 2.0, tvd_T)) == 20.0
