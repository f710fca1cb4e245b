"""Small models, pairs and a reward function for the tests of ``aligndistil analyze``, and the command in ranks."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.distributed.harness import run_ranks
from tests.integration.program import write_model, write_pairs

REWARDS = """
def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]
"""
TP2 = ("trainer.devices=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")


class Setting:
    """Everything below ``folder``; models by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = {name: write_model(folder / name, seed) for seed, name in enumerate(("model", "dpo", "reverse"))}
        self.models["reward"] = _reward_model(folder / "reward", self.models["model"])
        self.train = write_pairs(folder / "train.jsonl", 14)
        self.test = write_pairs(folder / "test.jsonl", 9, seed=1)
        (folder / "my_rewards.py").write_text(REWARDS)

    def arguments(self, analysis: str, output: str, *overrides: str) -> list[str]:
        """What follows ``analyze``, in fp32."""
        data = (f"model.data.cache_dir={self.folder / 'cache'}", "model.data.max_prompt_length=96")
        return self.passes(analysis, output, *data, *overrides)

    def passes(self, command: str, output: str, *overrides: str) -> list[str]:
        """What follows ``analyze`` or ``evaluate``, but for an analysis's data, in fp32."""
        return [
            command,
            f"output={self.folder / output}",
            "model.encoder_seq_length=128",
            "model.micro_batch_size=4",
            "trainer.precision=32",
            *overrides,
        ]

    def rewards(self, output: str, *overrides: str) -> list[str]:
        """reward_accuracy of all rewards on both sets."""
        models = {"dpo": "dpo", "reverse_dpo": "reverse", "reference": "model", "reward_model": "reward"}
        return self.arguments(
            "reward_accuracy",
            output,
            *(f"models.{key}={self.models[name]}" for key, name in models.items()),
            f"analysis.train=[{self.train}]",
            f"analysis.test=[{self.test}]",
            "analysis.per_token=true",
            *overrides,
        )

    def tokens(self, output: str, *overrides: str) -> list[str]:
        """The token figures of three chosen responses."""
        return self.arguments(
            "tokens",
            output,
            f"models.dpo={self.models['dpo']}",
            f"models.reverse_dpo={self.models['reverse']}",
            f"models.policy={self.models['model']}",
            f"analysis.data=[{self.test}]",
            "analysis.limit=3",
            *overrides,
        )


def _reward_model(folder: Path, language_model: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    shutil.copytree(language_model, folder)
    config = Qwen2Config.from_pretrained(language_model, num_labels=1)
    torch.manual_seed(9)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def analyze(setting: Setting, world_size: int, *argvs: list[str]) -> None:
    """``aligndistil analyze`` in ranks that a launcher has started, with each of ``argvs`` after another."""
    run_ranks(world_size, _in_rank, str(setting.folder), argvs, timeout_seconds=200)


def keep_the_world() -> None:
    """Let analyses of this rank end their layout's groups alone: the harness needs the world's until the end."""
    from megatron.core import parallel_state

    from megatron_aligndistil.parallel import setup

    setup.shutdown = parallel_state.destroy_model_parallel


def _in_rank(folder: str, argvs: tuple[list[str], ...]) -> None:
    from megatron_aligndistil.launch import analyze as command

    keep_the_world()
    os.chdir(folder)  # where the reward function is found
    for argv in argvs:
        assert command.main(argv) == 0


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
