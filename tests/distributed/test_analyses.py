"""What the analyses measure on sharded models, in every layout, against dense formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.integration.analysis_setting import TP2, Setting, keep_the_world

LAYOUTS = {
    1: [()],
    2: [
        TP2,
        (
            "trainer.devices=2",
            "model.pipeline_model_parallel_size=2",
            "model.data.batching=packed",
            "model.micro_batch_size=1",
        ),
        ("trainer.devices=2", "model.micro_batch_size=3"),
    ],
}
LAYOUTS_RELATIVE = 1e-10
DENSE_RELATIVE = 1e-5  # transformers' norms and rotary angles are fp32 in a float64 model too
BETA0, ALPHA, EPSILON = 0.1, 20.0, 1e-3


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("analyses"))


def measured(argvs: list[list[str]]) -> list[Any]:
    """What each analysis measures, in a rank."""
    from importlib import import_module

    from megatron_aligndistil.config.analysis_rules import as_run
    from megatron_aligndistil.config.analysis_schema import ANALYSES
    from megatron_aligndistil.config.compose import load_overrides
    from megatron_aligndistil.launch import analysis_bench
    from megatron_aligndistil.launch.analyze import MODULES

    keep_the_world()
    found = []
    for name, *overrides in argvs:
        config: Any = load_overrides(ANALYSES[name], overrides, name)
        module = import_module(f"megatron_aligndistil.launch.{MODULES[name]}")
        with analysis_bench.bench(as_run(config, config.models.dpo)) as bench:
            found.append(module.measure(config, bench))
    return found


def every_layout(make: Any) -> list[Any]:
    """One result a layout: every rank's are the same."""
    results = []
    for world, layouts in LAYOUTS.items():
        for layout in layouts:
            ranks = run_ranks(world, measured, [make("x", *layout, "trainer.precision=64")], timeout_seconds=200)
            assert len(ranks) == world
            results += [own for (own,) in ranks]
    return results


class Dense:
    """The models by transformers, in float64, on responses tokenized as training does."""

    def __init__(self, setting: Setting) -> None:
        from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2ForSequenceClassification

        self.tokenizer = AutoTokenizer.from_pretrained(setting.models["model"])
        self.models = {
            name: Qwen2ForCausalLM.from_pretrained(setting.models[name]).double().eval()
            for name in ("model", "dpo", "reverse")
        }
        self.reward = Qwen2ForSequenceClassification.from_pretrained(setting.models["reward"]).double().eval()

    def tokens(self, row: dict[str, str], response: str) -> tuple[list[int], int]:
        prompt = f"user: {row['prompt']}<eos>assistant: "
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids + self.tokenizer(f"{row[response]}<eos>", add_special_tokens=False)["input_ids"], len(ids)

    @torch.no_grad()
    def log_softmax(self, name: str, ids: list[int], start: int) -> torch.Tensor:
        """log π of the distributions that predict the response's tokens, [T, V]."""
        return self.models[name](torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)

    @torch.no_grad()
    def score(self, ids: list[int]) -> float:
        hidden = self.reward.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(self.reward.score(hidden))


@pytest.fixture(scope="module")
def dense(setting: Setting) -> Dense:
    return Dense(setting)


def rows_of(path: Path) -> list[dict[str, str]]:
    import json

    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewards_are_those_of_whole_models(setting: Setting, dense: Dense) -> None:
    pairs = [[dense.tokens(row, response) for response in ("chosen", "rejected")] for row in rows_of(setting.test)]

    def of(statistic: Any) -> np.ndarray:
        return np.array([[statistic(ids, start) for ids, start in pair] for pair in pairs])

    def summed(name: str) -> np.ndarray:
        return of(
            lambda ids, start: float(
                dense.log_softmax(name, ids, start).gather(1, torch.tensor(ids[start:])[:, None]).sum()
            )
        )

    model, dpo, reverse = (summed(name) for name in ("model", "dpo", "reverse"))
    lengths = of(lambda ids, start: len(ids) - start)
    expected = {
        "reward model": of(lambda ids, start: dense.score(ids)),
        "DPO reward": BETA0 * (dpo - model),
        "contrastive reward": BETA0 * (dpo - reverse),
    }
    expected |= {f"{name}, per token": values / lengths for name, values in expected.items()}
    one, *others = every_layout(setting.rewards)
    for found in (one, *others):
        assert list(found["test"]) == list(expected) and len(found["train"]["DPO reward"]) == 14
        for name, values in expected.items():
            assert found["test"][name] == pytest.approx(values, rel=DENSE_RELATIVE, abs=1e-7), name
            assert found["test"][name] == pytest.approx(one["test"][name], rel=LAYOUTS_RELATIVE, abs=1e-12), name


def test_token_figures_are_those_of_whole_distributions(setting: Setting, dense: Dense) -> None:
    expected = []
    for row in rows_of(setting.test)[:3]:
        ids, start = dense.tokens(row, "chosen")
        p, d, r = (dense.log_softmax(name, ids, start) for name in ("model", "dpo", "reverse"))
        tvd = (d.exp() - r.exp()).abs().sum(-1) / 2
        alpha = ALPHA * tvd + EPSILON
        teacher = (d + alpha[:, None] * (d - r)).log_softmax(-1)
        label = torch.tensor(ids[start:])[:, None]
        expected.append(
            {
                "alpha": alpha,
                "tvd": tvd,
                "reward": BETA0 * (d - r).gather(1, label)[:, 0],
                "kl_to_teacher": (p.exp() * (p - teacher)).sum(-1),
                "kl_to_dpo": (p.exp() * (p - d)).sum(-1),
            }
        )
    one, *others = every_layout(setting.tokens)
    for found in (one, *others):
        assert [own.origin for own in found] == [f"{setting.test}:{i}" for i in (1, 2, 3)]
        for own, first, wanted in zip(found, one, expected, strict=True):
            assert list(own.figures) == list(wanted)
            for name, values in wanted.items():
                assert own.figures[name] == pytest.approx(values.numpy(), rel=DENSE_RELATIVE, abs=1e-7), name
                assert own.figures[name] == pytest.approx(first.figures[name], rel=LAYOUTS_RELATIVE, abs=1e-12), name
