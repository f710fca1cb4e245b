"""What the miniature trains: its stages, what each needs, and the commands that they come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch.quickstart_recipe import hydra_value

CONFIGS = Path(__file__).parents[2] / "examples" / "paper_mini"
BASE, SFT, REWARD_MODEL = "base", "sft", "reward_model"
START = "model.restore_from_path"
ENDED = "ended.json"  # in a run's log folder once its model is exported: its command and seconds


@dataclass(frozen=True)
class Stage:
    """One training. ``data`` is the file of its rows; ``needs`` maps stages to the keys that take their models."""

    title: str
    data: str
    needs: Mapping[str, str]


def _preference(title: str) -> Stage:
    return Stage(title, "pairs", {SFT: START})


def _distillation(title: str) -> Stage:
    paths = {"dpo": "model.aligndistil.dpo_path", "reverse_dpo": "model.aligndistil.reverse_dpo_path"}
    return Stage(title, "pairs", {SFT: START, **paths})


STAGES: Mapping[str, Stage] = {
    SFT: Stage("SFT", "demonstrations", {BASE: START}),
    REWARD_MODEL: _preference("reward model"),
    "dpo": _preference("DPO"),
    "reverse_dpo": _preference("reverse DPO"),
    "dpo_001": _preference("DPO, β = 0.01"),
    "kto": _preference("KTO"),
    "tdpo1": _preference("TDPO1"),
    "tdpo2": _preference("TDPO2"),
    "simpo": _preference("SimPO"),
    "ppo": Stage("PPO", "pairs", {SFT: START, REWARD_MODEL: "model.reward.path"}),
    "rto": Stage("RTO", "pairs", {SFT: START, REWARD_MODEL: "model.reward.path", "dpo": "model.rto.dpo_path"}),
    "aligndistil": _distillation("AlignDistil, off-policy"),
    "aligndistil_on_policy": _distillation("AlignDistil, on-policy"),
}
# The rows of the table; the others are means.
METHODS = tuple(name for name in STAGES if name not in (REWARD_MODEL, "reverse_dpo"))


@dataclass(frozen=True)
class Layout:
    """Where things are under the output folder."""

    root: Path

    @property
    def random(self) -> Path:
        """The base model before its training."""
        return self.root / "random"

    @property
    def random_is_whole(self) -> bool:
        """The weights are written last."""
        return (self.random / "model.safetensors").is_file()

    @property
    def reading(self) -> Path:
        """The base model's rows."""
        return self.root / "data" / "reading.jsonl"

    def data(self, name: str, seed: int) -> Path:
        return self.root / "data" / f"{name}_{seed}.jsonl"

    def run(self, name: str, seed: int) -> Path:
        """A run's log folder; all seeds have one base model."""
        return self.root / name / f"seed_{seed}" if name != BASE else self.root / BASE

    def model(self, name: str, seed: int) -> Path:
        """The Hugging Face folder that a run exports."""
        return self.run(name, seed) / "huggingface"


@dataclass(frozen=True)
class Run:
    """A training with one seed. ``needs`` are the log folders of the runs whose models it takes."""

    title: str
    folder: Path
    arguments: tuple[str, ...]
    needs: tuple[Path, ...]

    @property
    def ended(self) -> Path:
        return self.folder / ENDED


def with_needs(names: Iterable[str]) -> list[str]:
    """``names`` and all that they need but the base model, in an order in which they can be trained.

    Raises:
        ConfigError: there is no stage of a name.
    """
    wanted: set[str] = set()

    def add(name: str) -> None:
        if name not in STAGES:
            raise ConfigError(f"--methods {name}: no such method; choose from {', '.join(METHODS)}")
        wanted.add(name)
        for need in STAGES[name].needs:
            if need != BASE:
                add(need)

    for name in names:
        add(name)
    return [name for name in STAGES if name in wanted]


def needed_beside_sft(name: str) -> list[str]:
    """The stages whose models ``name`` takes, directly or not, but for SFT and the base model."""
    return [need for need in with_needs([name]) if need not in (name, SFT)]


def base_run(layout: Layout) -> Run:
    """The base model's training."""
    own = {START: layout.random, "model.data.data_prefix.train": [layout.reading]}
    return Run("base model", layout.run(BASE, 0), _arguments(layout, BASE, 0, own, ()), ())


def stage_run(layout: Layout, name: str, seed: int, overrides: Sequence[str] = ()) -> Run:
    """The training of a stage; ``overrides`` come last, and so win."""
    stage = STAGES[name]
    own: dict[str, object] = {key: layout.model(need, seed) for need, key in stage.needs.items()}
    own["model.data.data_prefix.train"] = [layout.data(stage.data, seed)]
    own["model.seed"] = seed
    needs = tuple(layout.run(need, seed) for need in stage.needs)
    title = f"{stage.title}, seed {seed}"
    return Run(title, layout.run(name, seed), _arguments(layout, name, seed, own, overrides), needs)


def _arguments(
    layout: Layout, name: str, seed: int, own: Mapping[str, object], overrides: Sequence[str]
) -> tuple[str, ...]:
    every = {
        **own,
        "exp_manager.explicit_log_dir": layout.run(name, seed),
        # Runs that tokenize the same rows at the same time must not meet.
        "model.data.cache_dir": layout.root / "tokenized" / f"{name}_{seed}",
    }
    config = ("--config-dir", str(CONFIGS), "--config-name", f"mini_{name}")
    return ("train", *config, *(f"{key}={hydra_value(value)}" for key, value in every.items()), *overrides)
