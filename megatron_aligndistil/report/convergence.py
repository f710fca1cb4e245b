"""Which objective converges faster (paper section 6.5, Figure 2), from the metrics that training runs have logged.

The runs of an objective lie in <folder>/<objective>/seed_<n>/, each with its ``metrics.jsonl``. A point of a curve is
the mean over a window of logged steps up to its own, so that a curve only knows the past.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.report.chart import Axes, line_chart
from megatron_aligndistil.report.run_metrics import read_metrics, training_curve
from megatron_aligndistil.report.table import markdown_table

OBJECTIVES = ("distributional", "token_scalar", "sentence_level")
METRIC, METRICS_FILE, WINDOW = "token_reward", "metrics.jsonl", 5
FINAL_SHARE = 0.1  # of the steps, at their end, whose mean is a run's final reward
SVG_FILE, CSV_FILE, TABLE_FILE = "convergence.svg", "convergence.csv", "convergence.md"
NOT_REACHED, NOT_RISEN = "not reached", "did not rise"
_SEED = re.compile(r"seed_(0|[1-9]\d*)")


@dataclass(frozen=True)
class Curves:
    """The logged rewards [seeds, steps] of each objective; seeds and steps are everyone's."""

    metric: str
    seeds: Sequence[int]
    steps: Sequence[int]
    rewards: Mapping[str, np.ndarray]
    window: int

    def smoothed(self, objective: str) -> np.ndarray:
        """The curve of each seed [seeds, steps]: the mean over the window up to a step, shorter where it begins."""
        sums_NT = np.cumsum(self.rewards[objective], axis=1)
        before_NT = np.zeros_like(sums_NT)
        before_NT[:, self.window :] = sums_NT[:, : -self.window]
        return (sums_NT - before_NT) / np.minimum(np.arange(1, sums_NT.shape[1] + 1), self.window)

    def final(self, objective: str) -> np.ndarray:
        """The mean reward at the end of training, [seeds]."""
        return self.rewards[objective][:, -self.final_steps :].mean(axis=1)

    @property
    def final_steps(self) -> int:
        """How many logged steps the final reward averages."""
        return max(1, round(FINAL_SHARE * len(self.steps)))


@dataclass(frozen=True)
class Speed:
    """When one objective passed what ``against`` ended with, under the same seed."""

    against: str
    seed: int
    target: float
    own_step: int | None  # when that one passed it itself; it may have stood still since
    step: int | None
    verdict: str = ""  # why there is no step


def read_curves(folder: Path, objectives: Sequence[str], metric: str, window: int) -> Curves:
    """The training curves of all runs below ``folder``.

    Raises:
        DataError: a run or its metric is missing, there is one seed only, or runs differ in their seeds or steps.
    """
    seeds_of = {objective: _seeds(folder / objective) for objective in objectives}
    for objective, seeds in seeds_of.items():
        if seeds != seeds_of[objectives[0]]:
            raise DataError(
                f"{folder / objective}: has the seeds {_listed(seeds)}, but {objectives[0]} "
                f"{_listed(seeds_of[objectives[0]])}; train the missing ones, or move the others away"
            )
    seeds = seeds_of[objectives[0]]
    if len(seeds) < 2:
        raise DataError(f"{folder}: has runs of seed {seeds[0]} only; standard errors need two seeds or more")
    runs = {
        (objective, seed): _points(folder / objective / f"seed_{seed}", metric)
        for objective in objectives
        for seed in seeds
    }
    steps = max((list(points) for points in runs.values()), key=len)
    for (objective, seed), points in runs.items():
        if list(points) != steps:
            raise DataError(
                f"{folder / objective / f'seed_{seed}'}: has logged {len(points)} steps up to {max(points)}, another "
                f"run {len(steps)} up to {steps[-1]}; resume it, or train all with the same steps"
            )
    if not 1 <= window <= len(steps):
        raise DataError(f"--window {window}: must be from 1 to the {len(steps)} logged steps")
    rewards = {
        objective: np.array([list(runs[objective, seed].values()) for seed in seeds]) for objective in objectives
    }
    return Curves(metric, seeds, steps, rewards, window)


def speeds(curves: Curves, fast: str, against: str) -> list[Speed]:
    """For each seed, the first step whose smoothed reward of ``fast`` is at least the final reward of ``against``.

    Steps before the first whole window don't count. An objective that ends no higher than it began says nothing about
    speed: any objective would have "reached" that at once.
    """
    found = []
    fast_NT, against_NT = curves.smoothed(fast), curves.smoothed(against)
    for row, (seed, target) in enumerate(zip(curves.seeds, curves.final(against).tolist(), strict=True)):
        if target <= against_NT[row, curves.window - 1]:
            found.append(Speed(against, seed, target, None, None, NOT_RISEN))
            continue
        own_step, step = (_first_step(curves, smoothed_NT[row], target) for smoothed_NT in (against_NT, fast_NT))
        found.append(Speed(against, seed, target, own_step, step, "" if step else NOT_REACHED))
    return found


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard error of the mean; the latter is NaN for fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(array.size) if array.size > 1 else math.nan
    return float(array.mean()), error


def report(curves: Curves) -> str:
    """The tables as Markdown. The first objective is the one whose speed is told."""
    fast, *others = curves.rewards
    finals = []
    for objective in curves.rewards:
        mean, error = mean_and_error(curves.final(objective))
        start, _ = mean_and_error(curves.rewards[objective][:, 0])
        finals.append((objective, f"{start:.4f}", f"{mean:.4f}", f"{error:.4f}"))
    rows = []
    for other in others:
        found = speeds(curves, fast, other)
        rows += [
            (other, str(speed.seed), f"{speed.target:.4f}", *_cells(speed, curves.steps[-1]), speed.verdict)
            for speed in found
        ]
        rows.append((other, "mean", "", "", "", *_mean_ratios(found, curves.steps[-1]), ""))
    seeds, total = _listed(curves.seeds), curves.steps[-1]
    return "\n\n".join(
        [
            f"# Convergence of `{curves.metric}`: {total} steps, seeds {seeds}",
            f"![Convergence]({SVG_FILE})",
            markdown_table(("objective", "first step", "final", "standard error"), finals),
            f"Final: the mean over the last {curves.final_steps} logged steps. Standard errors are those over "
            f"{len(curves.seeds)} seeds.",
            markdown_table(
                (
                    "against",
                    "seed",
                    "its final",
                    "its step",
                    f"step of {fast}",
                    f"{total} / step",
                    "its step / step",
                    "",
                ),
                rows,
            ),
            f"Steps are the first ones at which a curve, smoothed over the {curves.window} logged steps up to it, is "
            f"at least the other's final value under the same seed: {fast}'s and the other's own. {total} / step "
            "compares with the whole training of the other, and so grows with its length once the other stands still; "
            "its step / step doesn't. Only whole windows count, so that no ratio exceeds "
            f"{total / curves.steps[curves.window - 1]:.3g}. '{NOT_RISEN}': the other ended no higher than in its "
            f"first {curves.window} logged steps, so that it can't be said when its final value was reached.",
        ]
    )


def chart(curves: Curves) -> str:
    """The smoothed curves as SVG: mean over seeds, and a band of one standard error to either side."""
    lines, bands = {}, {}
    for objective in curves.rewards:
        mean_T, error_T = _over_seeds(curves, objective)
        name = objective.replace("_", " ")
        lines[name] = list(zip(curves.steps, mean_T, strict=True))
        bands[name] = list(zip(curves.steps, mean_T - error_T, mean_T + error_T, strict=True))
    title = f"{curves.metric}: mean ± standard error of {len(curves.seeds)} seeds, window of {curves.window} steps"
    return line_chart(lines, Axes(title, "step", curves.metric), bands)


def table_csv(curves: Curves) -> str:
    """The points of the chart: step, objective, mean, se."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", "objective", "mean", "se"))
    for objective in curves.rewards:
        for step, mean, error in zip(curves.steps, *_over_seeds(curves, objective), strict=True):
            writer.writerow((step, objective, f"{mean:.8g}", f"{error:.8g}"))
    return text.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. Errors of the user's are raised."""
    options = _parser().parse_args(arguments)
    curves = read_curves(options.runs, options.objectives, options.metric, options.window)
    output = options.output or options.runs
    output.mkdir(parents=True, exist_ok=True)
    text = report(curves)
    for name, content in ((SVG_FILE, chart(curves)), (CSV_FILE, table_csv(curves)), (TABLE_FILE, text + "\n")):
        write_text(output / name, content)
    print(f"{text}\n\n{output / SVG_FILE}")
    return 0


def _seeds(folder: Path) -> list[int]:
    matches = [_SEED.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    seeds = sorted(int(match[1]) for match in matches if match)
    if not seeds:
        raise DataError(f"{folder}: no runs (seed_<n>/{METRICS_FILE}); train them, or name others by --objectives")
    return seeds


def _points(run: Path, metric: str) -> dict[int, float]:
    """Step → logged value of the training records of a run."""
    path = run / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{path}: no such file; the run has not started, train it")
    points = {int(step): value for step, value in training_curve(read_metrics(path), metric)}
    if not points:
        raise DataError(f"{path}: no training record has {metric}; choose another by --metric, or log it in training")
    for step, value in points.items():
        if not math.isfinite(value):
            raise DataError(f"{path}: {metric} is {value} at step {step}; the run has diverged, lower model.optim.lr")
    return points


def _over_seeds(curves: Curves, objective: str) -> tuple[np.ndarray, np.ndarray]:
    smoothed_NT = curves.smoothed(objective)
    return smoothed_NT.mean(axis=0), smoothed_NT.std(axis=0, ddof=1) / math.sqrt(len(curves.seeds))


def _first_step(curves: Curves, smoothed_T: np.ndarray, target: float) -> int | None:
    """The first step at which a whole window's mean is at least ``target``."""
    first = curves.window - 1
    passed = np.flatnonzero(smoothed_T[first:] >= target)
    return curves.steps[first + int(passed[0])] if passed.size else None


def _ratios(speed: Speed, total: int) -> tuple[float | None, float | None]:
    """How many times sooner than the end of the other's training, and than the other's own step."""
    if speed.step is None:
        return None, None
    return total / speed.step, None if speed.own_step is None else speed.own_step / speed.step


def _cells(speed: Speed, total: int) -> tuple[str, str, str, str]:
    ratios = ("-" if ratio is None else f"{ratio:.2f}" for ratio in _ratios(speed, total))
    return str(speed.own_step or "-"), str(speed.step or "-"), *ratios  # type: ignore[return-value]


def _mean_ratios(found: Sequence[Speed], total: int) -> tuple[str, str]:
    """Mean ± standard error of both ratios, and over how many seeds where not over all."""
    texts = []
    for ratios in zip(*(_ratios(speed, total) for speed in found), strict=True):
        known = [ratio for ratio in ratios if ratio is not None]
        if not known:
            texts.append("-")
            continue
        mean, error = mean_and_error(known)
        some = "" if len(known) == len(found) else f" ({len(known)} of {len(found)} seeds)"
        texts.append((f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}") + some)
    return texts[0], texts[1]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Compare how fast training objectives converge: writes {SVG_FILE}, {CSV_FILE} and {TABLE_FILE}.",
    )
    parser.add_argument("runs", type=Path, help=f"folder with <objective>/seed_<n>/{METRICS_FILE}")
    parser.add_argument(
        "--objectives",
        nargs="+",
        default=OBJECTIVES,
        help="folders of runs; the first's speed is told against each of the others (default: %(default)s)",
    )
    parser.add_argument("--metric", default=METRIC, help="what the curves show (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=WINDOW, help="logged steps a point averages (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="folder of the results (default: the runs')")
    return parser
