"""Learning rates chosen by training losses: the last quarter counts, and DPO starts from SFT's best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_aligndistil.errors import TrainingError
from megatron_aligndistil.launch import paper_mini_rates
from megatron_aligndistil.launch.paper_mini_plan import Layout, Run
from megatron_aligndistil.launch.paper_mini_rates import compare_rates, final_loss

BEST = {"sft": 1e-3, "dpo": 1e-4}


def write_losses(folder: Path, losses: Sequence[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": n, "phase": "train", "loss": loss}) + "\n" for n, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_the_last_quarter_of_the_steps_counts(tmp_path: Path) -> None:
    write_losses(tmp_path, [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 2.0])
    assert final_loss(tmp_path) == 1.5
    write_losses(tmp_path, [])
    with pytest.raises(TrainingError, match="has logged no loss; remove the folder"):
        final_loss(tmp_path)


def test_each_stage_takes_its_lowest_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Run] = []

    def train(runs: Sequence[Run], jobs: int) -> None:
        assert jobs == 2 and not any(run.needs for run in runs)
        trained.extend(runs)
        for run in runs:
            stage, rate = run.folder.name.split("_")
            write_losses(run.folder, [5.0, 5.0, 5.0, abs(float(rate) - BEST[stage])])

    monkeypatch.setattr(paper_mini_rates, "train_all", train)
    layout = Layout(tmp_path)
    assert compare_rates(layout, 2) == BEST
    assert "0.0000 at 0.001; 0.001 is best" in capsys.readouterr().out
    assert len({run.folder for run in trained}) == len(trained) == 8
    for run in trained:
        settings = dict(argument.split("=", 1) for argument in run.arguments if "=" in argument)
        stage, rate = run.folder.name.split("_")
        start = layout.model("base", 101) if stage == "sft" else tmp_path / "rates" / "sft_0.001" / "huggingface"
        assert settings["model.restore_from_path"] == str(start)
        assert (settings["model.optim.lr"], settings["model.seed"]) == (rate, "101")
        assert settings["exp_manager.explicit_log_dir"] == str(run.folder)
