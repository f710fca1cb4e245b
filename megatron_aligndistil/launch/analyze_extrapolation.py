"""``aligndistil analyze extrapolation`` (paper Table 3): constant weights against the adaptive one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_aligndistil.algorithms.statistics import hidden_states
from megatron_aligndistil.config.analysis_schema import ExtrapolationAnalysisConfig
from megatron_aligndistil.evaluation.answers import compare
from megatron_aligndistil.evaluation.passes import Listed
from megatron_aligndistil.evaluation.token_figures import token_divergence
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.launch.analysis_answers import (
    Asked,
    Drawn,
    answers_of,
    draw,
    reward_models,
    sampling_note,
    scores,
)
from megatron_aligndistil.launch.analysis_bench import HIDDEN_WINDOW, Bench, Named
from megatron_aligndistil.launch.variants import Variant, training_of, variants_of
from megatron_aligndistil.report.analysis import Report
from megatron_aligndistil.report.answers import comparison, intervals_note, trade_off_chart

NAME, BASELINE = "extrapolation", "DPO"
DIVERGENCE = "KL to the DPO model"


@dataclass(frozen=True)
class Measured:
    """Each model's answers and rewards, and of each variant KL(π ‖ π_d) a prompt [P]."""

    drawn: Mapping[str, Drawn]
    scored: Mapping[str, np.ndarray]
    divergences: Mapping[str, np.ndarray]


def models_of(config: ExtrapolationAnalysisConfig) -> list[Named]:
    """The DPO model, the variants, and the reward's models."""
    dpo = _dpo(config)
    variants = [_named(variant) for variant in variants_of(config)]
    return [dpo, *variants, *reward_models(config.analysis.reward, dpo.path)]


def measure(config: ExtrapolationAnalysisConfig, bench: Bench) -> Measured:
    """Answers, rewards and divergences, on every rank."""
    settings, output = config.analysis, Path(config.output).expanduser()
    asked = Asked.of(bench, settings.prompts, settings.limit, settings.seed)
    models = {BASELINE: _dpo(config), **{variant.name: _named(variant) for variant in variants_of(config)}}
    drawn, divergences = {}, {}
    for name, named in models.items():
        folder = output / "engines" / name.replace(" ", "_")
        drawn[name] = draw(bench, named, asked.examples, settings.sampling, folder)
        if name != BASELINE:
            divergences[name] = _divergence(bench, named, models[BASELINE], drawn[name])
    sequences = {name: own.sequences for name, own in drawn.items()}
    return Measured(drawn, scores(bench, settings.reward, sequences), divergences)


def _divergence(bench: Bench, policy: Named, dpo: Named, drawn: Drawn) -> np.ndarray:
    """The mean over each answer's tokens of KL(π ‖ π_d), [P]."""
    models = bench.models([policy, dpo], hidden_states)
    compute = token_divergence(policy.key, dpo.key, KernelSettings.of(bench.run.model.kernel))
    found = bench.passes(HIDDEN_WINDOW).run(models, hidden_states, compute, Listed(drawn.sequences))
    return np.array([own["kl"].astype(np.float64).mean() for own in found])


def report(config: ExtrapolationAnalysisConfig, measured: Measured) -> Report:
    """The table and both charts."""
    settings = config.analysis
    rows = compare(
        answers_of(measured.drawn, measured.scored),
        BASELINE,
        {},
        settings.bootstrap_samples,
        settings.seed,
        {DIVERGENCE: measured.divergences},
    )
    by_name = {row.model: row for row in rows}
    lines = {
        "constant": [by_name[variant.name] for variant in variants_of(config) if variant.constant is not None],
        "adaptive": [by_name[variant.name] for variant in variants_of(config) if variant.constant is None],
    }
    prompts, beta0 = len(measured.drawn[BASELINE].samples), training_of(config).model.aligndistil.beta0
    notes = [
        sampling_note(settings.sampling, prompts, config.model.seed),
        f"Reward: {settings.reward.source}. {DIVERGENCE}: KL(π ‖ π_d) in nats, the mean over the tokens of each answer "
        f"of the model's own, then over prompts. β₀ = {beta0:g}.",
        intervals_note(settings.bootstrap_samples, settings.seed),
    ]
    made = comparison(NAME, "Constant and adaptive extrapolation", rows, BASELINE, notes, {})
    trade_off = trade_off_chart({name: of for name, of in lines.items() if of}, DIVERGENCE)
    return made.with_chart(f"{NAME}_trade_off.svg", trade_off)


def _dpo(config: ExtrapolationAnalysisConfig) -> Named:
    return Named("model.aligndistil.dpo_path", training_of(config).model.aligndistil.dpo_path)


def _named(variant: Variant) -> Named:
    return Named(variant.name, str(variant.folder))
