"""How the miniature's learning rates were chosen: by training losses, on a seed that is reported nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_aligndistil.errors import TrainingError
from megatron_aligndistil.launch.paper_mini_plan import SFT, STAGES, START, Layout, Run, stage_run
from megatron_aligndistil.launch.paper_mini_runs import train_all
from megatron_aligndistil.launch.quickstart_recipe import hydra_value
from megatron_aligndistil.report.run_metrics import read_metrics, training_curve

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
SEED = 101
SHARE = 0.25  # of the steps, at their end, whose mean loss is compared


def compare_rates(layout: Layout, jobs: int) -> dict[str, float]:
    """Train SFT, and DPO from its best, at each rate, and print whose loss ends lowest. Returns a stage's best rate.

    Rows and the base model must be there. DPO's rate is the one of all methods that start from SFT.
    """
    best, start = {}, None
    for stage in (SFT, "dpo"):
        runs = {rate: _trial(layout, stage, rate, start) for rate in RATES}
        train_all(list(runs.values()), jobs)
        losses = {rate: final_loss(run.folder) for rate, run in runs.items()}
        best[stage] = lowest(losses)
        start = runs[best[stage]].folder / "huggingface"
        listed = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in losses.items())
        print(
            f"{STAGES[stage].title}: mean loss of the last {SHARE:.0%} of the steps {listed}; {best[stage]:g} is best"
        )
    return best


def lowest(losses: Mapping[float, float]) -> float:
    """The rate of the lowest loss."""
    return min(losses, key=lambda rate: losses[rate])


def final_loss(folder: Path) -> float:
    """The mean training loss of the last ``SHARE`` of the steps of the run in ``folder``.

    Raises:
        TrainingError: it has logged none.
    """
    losses = [loss for _, loss in training_curve(read_metrics(folder / "metrics.jsonl"), "loss")]
    if not losses:
        raise TrainingError(f"{folder}: has logged no loss; remove the folder and start again")
    last = losses[-max(1, round(SHARE * len(losses))) :]
    return sum(last) / len(last)


def _trial(layout: Layout, stage: str, rate: float, start: Path | None) -> Run:
    folder = layout.root / "rates" / f"{stage}_{rate:g}"
    own = {
        "model.optim.lr": rate,
        "exp_manager.explicit_log_dir": folder,
        "model.data.cache_dir": f"{folder}_tokenized",
    }
    if start is not None:
        own[START] = start
    run = stage_run(layout, stage, SEED, [f"{key}={hydra_value(value)}" for key, value in own.items()])
    return replace(run, title=f"{STAGES[stage].title} at {rate:g}", folder=folder, needs=())
