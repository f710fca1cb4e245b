"""``aligndistil analyze reward_accuracy`` (paper Table 2): how often each reward prefers the chosen response."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from megatron_aligndistil.algorithms.algorithm import RoleOutput
from megatron_aligndistil.algorithms.statistics import sequence_scores
from megatron_aligndistil.config.analysis_schema import RewardAccuracyAnalysisConfig
from megatron_aligndistil.evaluation.passes import summed_logprobs
from megatron_aligndistil.evaluation.reward_accuracy import (
    NEEDS,
    PER_TOKEN,
    Accuracy,
    Difference,
    accuracy,
    differences,
    rewards,
)
from megatron_aligndistil.launch.analysis_bench import NUMBERS_WINDOW, Bench, Named, Pairs, sampled
from megatron_aligndistil.report.analysis import Cell, Report, Table, csv_cells, percent
from megatron_aligndistil.report.chart import Axes, bar_chart
from megatron_aligndistil.types import Batch

logger = logging.getLogger(__name__)

NAME = "reward_accuracy"

Measured = Mapping[str, Mapping[str, np.ndarray]]


def models_of(config: RewardAccuracyAnalysisConfig) -> list[Named]:
    """The models that some reward needs."""
    given = {name: path for name, path in vars(config.models).items() if path is not None}
    used = {model for needed in NEEDS.values() if all(name in given for name in needed) for model in needed}
    return [Named(f"models.{name}", path, name == "reward_model") for name, path in given.items() if name in used]


def measure(config: RewardAccuracyAnalysisConfig, bench: Bench) -> Measured:
    """Set → reward → its values [P, 2] on every rank."""
    settings = config.analysis
    sets: dict[str, Pairs] = {}
    for name in ("train", "test"):
        if getattr(settings, name):
            examples = bench.examples(getattr(settings, name), "preference")
            sets[name] = Pairs(examples, sampled(len(examples), settings.limit, settings.seed))
    statistics: dict[str, dict[str, np.ndarray]] = {name: {} for name in sets}
    lengths: dict[str, np.ndarray] = {}
    passes = bench.passes(NUMBERS_WINDOW)
    for named in models_of(config):
        keep = sequence_scores if named.scalar else summed_logprobs(config.model.kernel)
        model, role = bench.model(named, keep), named.key.removeprefix("models.")
        for name, pairs in sets.items():
            logger.info("%s: %d %s pairs", named.key, len(pairs.indices), name)
            found = passes.run({role: model}, keep, _with_length, pairs)
            statistics[name][role] = np.array([own["kept"][0] for own in found], np.float64).reshape(-1, 2)
            lengths[name] = np.array([own["length"][0] for own in found], np.int64).reshape(-1, 2)
        del model  # one at a time: the next may need its memory
    return {name: rewards(statistics[name], lengths[name], settings.beta0, settings.per_token) for name in sets}


def _with_length(batch: Batch, outputs: Mapping[str, RoleOutput]) -> Mapping[str, Tensor]:
    (output,) = outputs.values()
    return {"kept": output.kept, "length": batch.response_lengths}


def report(config: RewardAccuracyAnalysisConfig, values: Measured) -> Report:
    """The accuracies of what was measured."""
    settings = config.analysis
    accuracies = {name: [accuracy(reward, own) for reward, own in of.items()] for name, of in values.items()}
    paired = {name: differences(of, settings.bootstrap_samples, settings.seed) for name, of in values.items()}
    bars = {
        name: {own.reward: (own.share.value, own.share.low, own.share.high) for own in rows}
        for name, rows in accuracies.items()
    }
    left_out = [name for name, needed in NEEDS.items() if name not in next(iter(values.values()))]
    notes = [
        "Accuracy: per cent of pairs whose chosen response has the higher reward, a tie counting as half, with "
        "Wilson's 95 % interval. Differences are in percentage points on the same pairs, with the 95 % interval of "
        f"{settings.bootstrap_samples} bootstrap samples of the pairs (seed {settings.seed}).",
        f"β₀ = {settings.beta0:g}.",
    ]
    notes += [f"Left out: {name}, which needs {_needed(name)}." for name in left_out]
    return Report(
        name=NAME,
        title="Reward accuracy",
        tables=[_accuracy_table(accuracies), _difference_table(paired)],
        columns=("set", "quantity", "against", "value", "low", "high", "ties", "pairs"),
        records=_records(accuracies, paired),
        charts={f"{NAME}.svg": bar_chart(bars, Axes("Reward accuracy", "", "share of pairs"))},
        notes=notes,
    )


def _needed(reward: str) -> str:
    return " and ".join(f"models.{model}" for model in NEEDS[reward.removesuffix(PER_TOKEN)])


def _accuracy_table(accuracies: Mapping[str, Sequence[Accuracy]]) -> Table:
    header = ["reward", *(f"{name} ({rows[0].pairs} pairs)" for name, rows in accuracies.items())]
    header += [f"ties ({name})" for name in accuracies]
    rows = [
        [of[0].reward, *(percent(own.share) for own in of), *(str(own.ties) for own in of)]
        for of in zip(*accuracies.values(), strict=True)
    ]
    return Table(header, rows, "Accuracy")


def _difference_table(paired: Mapping[str, Sequence[Difference]]) -> Table:
    rows = [
        [f"{of[0].first} − {of[0].second}", *(percent(own.value) for own in of)]
        for of in zip(*paired.values(), strict=True)
    ]
    return Table(["difference", *paired], rows, "Differences")


def _records(
    accuracies: Mapping[str, Sequence[Accuracy]], paired: Mapping[str, Sequence[Difference]]
) -> list[tuple[Cell, ...]]:
    records: list[tuple[Cell, ...]] = []
    for name, rows in accuracies.items():
        records += [(name, own.reward, None, *csv_cells(own.share), own.ties, own.pairs) for own in rows]
        records += [(name, own.first, own.second, *csv_cells(own.value), None, rows[0].pairs) for own in paired[name]]
    return records
