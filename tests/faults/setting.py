"""Tiny runs to be broken: preference pairs, and the policy's own responses."""

from __future__ import annotations

from pathlib import Path

from tests.faults.fleet import finished
from tests.integration.program import losses, write_model, write_pairs


def ranks_of(kind: str) -> int:
    """How many ranks a run of this kind has."""
    return 1 if kind.endswith("alone") else 2


class Setting:
    """Models, pairs, and arguments of runs on two ranks that save every second step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("model", "dpo", "reverse")
        self.models = {name: write_model(folder / name, seed) for seed, name in enumerate(names)}
        self.pairs = write_pairs(folder / "pairs.jsonl", 64)

    def arguments(self, kind: str, log_dir: Path, steps: int, *overrides: str) -> list[str]:
        """``kind``: training (DPO, two pipeline stages), sharded (bf16, DP=2), rollout (on-policy AlignDistil),
        alone and rollout_alone (the same on one rank).
        """
        return [
            *("--config-name", "aligndistil_on_policy" if kind.startswith("rollout") else "dpo"),
            f"model.restore_from_path={self.models['model']}",
            f"model.data.data_prefix.train=[{self.pairs}]",
            f"model.data.cache_dir={self.folder / 'cache'}",
            f"exp_manager.explicit_log_dir={log_dir}",
            *("exp_manager.resume_if_exists=true", "exp_manager.create_tensorboard_logger=false"),
            "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
            *("model.encoder_seq_length=128", "model.data.max_prompt_length=64", "model.micro_batch_size=2"),
            *(
                "model.global_batch_size=4",
                "model.optim.lr=1e-3",
                "trainer.precision=32",
                f"trainer.devices={ranks_of(kind)}",
            ),
            *(f"trainer.max_steps={steps}", "trainer.max_epochs=1000"),
            *self._own(kind),
            *overrides,
        ]

    def _own(self, kind: str) -> tuple[str, ...]:
        if kind == "training":
            return ("model.pipeline_model_parallel_size=2",)
        if kind == "alone":
            return ()
        if kind == "sharded":
            return "trainer.precision=bf16-mixed", "model.optim.name=distributed_fused_adam"
        return (
            f"model.aligndistil.dpo_path={self.models['dpo']}",
            f"model.aligndistil.reverse_dpo_path={self.models['reverse']}",
            *("model.rollout.max_new_tokens=8", "model.rollout.prompts_per_rollout=8"),
            "model.rollout.epochs_per_rollout=2",
        )

    def expected(self, kind: str, steps: int) -> dict[int, float]:
        """The losses of the run that nothing happens to."""
        log_dir = self.folder / f"whole_{kind}_{steps}"
        if not log_dir.exists():
            finished(self.folder / f"{log_dir.name}_output", self.arguments(kind, log_dir, steps), ranks_of(kind))
        found = losses(log_dir)
        assert sorted(found) == list(range(1, steps + 1))
        return found
