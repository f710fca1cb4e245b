"""What the quickstart runs: two recipes, and the commands that they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# In runs of some 20 steps bf16-mixed was seen to start more slowly than float32, probably since its main weights are
# copied from rounded ones, where small updates don't show at first.
PRECISION = "32"


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings. Learning rates are for steps of ``pairs_per_step`` pairs."""

    model: str
    tensor_parallel: int
    pipeline_parallel: int
    train_pairs: int
    questions_per_topic: int  # of the held-out prompts
    pairs_per_step: int
    epochs: int
    distillation_epochs: int
    micro_batch: int  # pairs, or responses in AlignDistil
    prompt_length: int
    sequence_length: int
    learning_rate: float
    warmup_steps: int
    max_new_tokens: int
    # Off-policy, in the scale of a TVD of range [0, 1]: twice the number that the paper's authors use.
    alpha: float
    # The trainer's own validation beside the dense evaluation at the end; a fifth of the time of a large model's run.
    cross_check: bool = False
    threads: int | None = None  # of this process; None: torch's own choice
    beta: float = 0.1
    epsilon: float = 1e-3

    @property
    def devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


SMOLLM2 = Recipe(
    model="SmolLM2-135M-Instruct",
    tensor_parallel=1,
    pipeline_parallel=2,
    train_pairs=64,
    questions_per_topic=2,
    pairs_per_step=4,
    epochs=1,
    distillation_epochs=1,
    micro_batch=1,
    prompt_length=80,
    sequence_length=160,
    learning_rate=2e-5,
    warmup_steps=4,
    max_new_tokens=48,
    alpha=20.0,  # the paper's for UltraFeedback
)

TINY = Recipe(
    model="a tiny Qwen2-shaped model",
    tensor_parallel=2,
    pipeline_parallel=2,
    train_pairs=64,
    questions_per_topic=2,
    pairs_per_step=8,
    epochs=1,
    distillation_epochs=1,
    micro_batch=4,
    prompt_length=96,
    sequence_length=256,
    learning_rate=3e-4,
    warmup_steps=1,
    max_new_tokens=32,
    alpha=2.0,  # chosen by trying: 20 gave degenerate text
    cross_check=True,
    threads=1,  # more would only wait for each other on matrices this small
)


@dataclass(frozen=True)
class Folders:
    """Where things are under the output folder."""

    root: Path

    @property
    def marker(self) -> Path:
        """Says that the folder is a quickstart's and may be cleared by the next one."""
        return self.root / "quickstart.json"

    @property
    def train(self) -> Path:
        return self.root / "data" / "train.jsonl"

    @property
    def heldout(self) -> Path:
        return self.root / "data" / "heldout.jsonl"

    @property
    def initial(self) -> Path:
        """The initial model as a Megatron checkpoint."""
        return self.root / "initial" / "megatron"

    @property
    def initial_huggingface(self) -> Path:
        return self.root / "initial" / "huggingface"

    def run(self, name: str) -> Path:
        """A training run's log folder."""
        return self.root / name

    def metrics(self, name: str) -> Path:
        return self.run(name) / "metrics.jsonl"

    def exported(self, name: str) -> Path:
        """The Hugging Face folder that a run has exported."""
        return self.run(name) / "huggingface"

    def log(self, name: str) -> Path:
        """What a stage has printed."""
        return self.root / "logs" / f"{name}.log"


def training_arguments(recipe: Recipe, folders: Folders, name: str, seed: int) -> list[str]:
    """What follows ``aligndistil`` to train ``name`` ("dpo", "reverse_dpo" or "aligndistil")."""
    overrides: dict[str, object] = {
        "exp_manager.explicit_log_dir": folders.run(name),
        "exp_manager.create_tensorboard_logger": False,
        # The exported model is all that is wanted of a run: nobody resumes it.
        "exp_manager.create_checkpoint_callback": False,
        "exp_manager.checkpoint_callback_params.export_hf_on_train_end": True,
        "trainer.accelerator": "cpu",
        "trainer.devices": recipe.devices,
        "trainer.precision": PRECISION,
        "model.restore_from_path": folders.initial,
        "model.seed": seed,
        "model.tensor_model_parallel_size": recipe.tensor_parallel,
        "model.pipeline_model_parallel_size": recipe.pipeline_parallel,
        "model.micro_batch_size": recipe.micro_batch,
        "model.global_batch_size": recipe.pairs_per_step,
        "model.encoder_seq_length": recipe.sequence_length,
        "model.data.max_prompt_length": recipe.prompt_length,
        "model.data.data_prefix.train": [folders.train],
        "model.data.data_prefix.validation": [folders.heldout] if recipe.cross_check else [],
        "model.data.cache_dir": folders.root / "data" / "tokenized",
        "model.optim.lr": recipe.learning_rate,
        "model.optim.sched.warmup_ratio": None,
        "model.optim.sched.warmup_steps": recipe.warmup_steps,
        **(_distillation(recipe, folders) if name == "aligndistil" else _preference(recipe)),
    }
    return ["train", "--config-name", name, *(f"{key}={hydra_value(value)}" for key, value in overrides.items())]


def _preference(recipe: Recipe) -> Mapping[str, object]:
    return {"trainer.max_epochs": recipe.epochs, "model.dpo.beta": recipe.beta}


def _distillation(recipe: Recipe, folders: Folders) -> Mapping[str, object]:
    return {
        "trainer.max_epochs": recipe.distillation_epochs,
        "trainer.val_before_training": recipe.cross_check,
        "model.data.responses": "chosen",
        "model.aligndistil.dpo_path": folders.exported("dpo"),
        "model.aligndistil.reverse_dpo_path": folders.exported("reverse_dpo"),
        "model.aligndistil.beta0": recipe.beta,
        "model.aligndistil.alpha": recipe.alpha,
        "model.aligndistil.epsilon": recipe.epsilon,
        "model.aligndistil.measure_initial_kl": recipe.cross_check,
    }


def hydra_value(value: object) -> str:
    """``value`` in Hydra's grammar of overrides; texts are quoted where they hold more than a word or a plain path."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(hydra_value(item) for item in value)}]"
    text = str(value)
    if text and all((character.isascii() and character.isalnum()) or character in "/._-+" for character in text):
        return text
    # In Hydra's quotes a backslash is special only before a quote, so that those in front of one are doubled.
    escaped = ""
    for index, piece in enumerate(text.split("'")):
        trailing = len(piece) - len(piece.rstrip("\\"))
        last = index == text.count("'")
        escaped += piece + "\\" * trailing + ("" if last else "\\'")
    return f"'{escaped}'"
