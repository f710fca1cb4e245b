"""What the keys of ``model.rollout`` come to: responses, optimizer steps, and the age of the weights that draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_aligndistil.config.rollout_schema import RolloutConfig


@dataclass(frozen=True)
class RolloutSizes:
    """A rollout draws ``prompts`` x ``samples`` responses, trained on ``epochs`` times in steps of ``train_batch``."""

    prompts: int
    samples: int
    epochs: int
    train_batch: int
    sync_every: int

    @classmethod
    def of(cls, rollout: RolloutConfig, global_batch_size: int) -> RolloutSizes:
        """The default rollout is one optimizer step's."""
        samples = rollout.samples_per_prompt
        prompts = rollout.prompts_per_rollout or global_batch_size // samples
        return cls(prompts, samples, rollout.epochs_per_rollout, global_batch_size, rollout.sync_every)

    @property
    def responses(self) -> int:
        """Responses a rollout."""
        return self.prompts * self.samples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see each response of a rollout once."""
        return self.responses // self.train_batch

    @property
    def steps(self) -> int:
        """Optimizer steps a rollout."""
        return self.steps_per_epoch * self.epochs

    @property
    def max_off_policy_steps(self) -> int:
        """Most steps by which the weights that drew a response can be older than those that learn from it."""
        return math.ceil(self.sync_every / self.steps) * self.steps - 1

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts x {self.samples} responses a rollout, {self.epochs} epochs of it in {self.steps} "
            f"steps of {self.train_batch}; weights to the engines every {self.sync_every} steps, so responses are at "
            f"most {self.max_off_policy_steps} steps off-policy"
        )
