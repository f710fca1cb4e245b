"""The runs that ``aligndistil analyze extrapolation`` compares: one per constant weight, and the adaptive one."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.config import checks, compose
from megatron_aligndistil.config.analysis_schema import ExtrapolationAnalysisConfig
from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.config.schema import AlignDistilRunConfig
from megatron_aligndistil.errors import ConfigError, TrainingError
from megatron_aligndistil.launch.failures import PROGRAM
from megatron_aligndistil.launch.quickstart_recipe import hydra_value

logger = logging.getLogger(__name__)

VARIANTS = "variants"  # in the output folder: the runs' log folders
FINISHED = "finished.yaml"  # in a log folder once the run has ended: the configuration that it was trained by
ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class Variant:
    """A run: ``constant`` is its weight, None for the adaptive one; ``arguments`` follow the program's name."""

    name: str
    constant: float | None
    folder: Path
    arguments: tuple[str, ...]

    @property
    def marker(self) -> Path:
        """Written when the run has ended."""
        return self.folder / FINISHED


def variants_of(config: ExtrapolationAnalysisConfig) -> list[Variant]:
    """The runs in the table's order: constants as they are given, the adaptive one last."""
    settings = config.analysis
    found = [_variant(config, f"constant {constant:g}", constant) for constant in settings.constants]
    return found + ([_variant(config, ADAPTIVE, None)] if settings.adaptive else [])


def _variant(config: ExtrapolationAnalysisConfig, name: str, constant: float | None) -> Variant:
    training = config.analysis.training
    folder = Path(config.output).expanduser() / VARIANTS / name.replace(" ", "_")
    own = [f"exp_manager.explicit_log_dir={hydra_value(folder)}", "exp_manager.resume_if_exists=true"]
    if constant is None:
        own.append("model.aligndistil.weight=adaptive")
    else:
        own += ["model.aligndistil.weight=constant", f"model.aligndistil.alpha={constant}"]
    directory = [] if training.config_dir is None else ["--config-dir", training.config_dir]
    arguments = ("train", "--config-name", training.config_name, *directory, *training.overrides, *own)
    return Variant(name, constant, folder, arguments)


def training_of(config: ExtrapolationAnalysisConfig, variant: Variant | None = None) -> AlignDistilRunConfig:
    """A variant's run, the first one's by default, checked.

    Raises:
        ConfigError: it isn't AlignDistil's, or leaves no checkpoint.
    """
    variant = variant or variants_of(config)[0]
    training = config.analysis.training
    overrides = variant.arguments[variant.arguments.index("--config-name") + 2 :]
    if training.config_dir is not None:
        overrides = overrides[2:]
    run = compose.load_config(training.config_name, overrides, training.config_dir)
    checks.check(run)
    if not isinstance(run, AlignDistilRunConfig):
        raise ConfigError(
            f"analysis.training.config_name={training.config_name}: trains by {run.algorithm}; name a recipe of "
            "AlignDistil"
        )
    manager = run.exp_manager
    if not manager.create_checkpoint_callback or not manager.checkpoint_callback_params.save_on_train_end:
        raise ConfigError(
            "analysis.training.overrides: the runs must end with a checkpoint; remove what turns "
            "exp_manager.create_checkpoint_callback or checkpoint_callback_params.save_on_train_end off"
        )
    return run


def train_all(config: ExtrapolationAnalysisConfig, can_start: bool) -> None:
    """Train the variants that aren't finished, one after another; a run that was interrupted goes on.

    can_start  false under a launcher, whose ranks must not start others: all must be finished then

    Raises:
        ConfigError: a variant was trained by other arguments, or isn't finished and can't be started.
        TrainingError: a run fails.
    """
    runs = [(variant, compose.to_yaml(training_of(config, variant))) for variant in variants_of(config)]
    waiting = [(variant, run) for variant, run in runs if not _finished(variant, run)]
    for variant, run in waiting:
        command = shlex.join((PROGRAM, *variant.arguments))
        if not can_start:
            raise ConfigError(
                f"{variant.folder}: not trained, and a launcher has started this process; start the analysis without "
                "one on one machine first, which trains what is missing"
            )
        logger.info("%s: %s", variant.name, command)
        variant.folder.parent.mkdir(parents=True, exist_ok=True)
        code = subprocess.run(
            [sys.executable, "-m", "megatron_aligndistil", *variant.arguments], check=False
        ).returncode
        if code:
            raise TrainingError(
                f"{variant.name}: its training ended with exit code {code}; see above, correct analysis.training and "
                "start again: what is finished is kept"
            )
        write_text(variant.marker, run)


def _finished(variant: Variant, run: str) -> bool:
    if not variant.marker.is_file():
        return False
    if variant.marker.read_text(encoding="utf-8") != run:
        raise ConfigError(
            f"{variant.marker}: the variant was trained by other settings; give another output, or remove "
            f"{variant.folder}"
        )
    return True
