"""Which run a job trains, on which nodes: a user's overrides and Slurm's settings brought together, and checked."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from megatron_aligndistil.config import checks, compose
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.config.slurm_schema import SlurmConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch.log_folder import log_directory
from megatron_aligndistil.launch.quickstart_recipe import hydra_value

logger = logging.getLogger(__name__)

DEVICES, NODES, ACCELERATOR = "trainer.devices", "trainer.num_nodes", "trainer.accelerator"
LOG_DIR, RESUME = "exp_manager.explicit_log_dir", "exp_manager.resume_if_exists"


@dataclass(frozen=True)
class Recipe:
    """A run as the user names it; paths that an earlier job makes are in ``made`` (key, path)."""

    name: str
    config_dir: str | None
    overrides: tuple[str, ...]
    made: tuple[tuple[str, Path], ...] = ()


@dataclass(frozen=True)
class Plan:
    """A checked run: ``arguments`` follow the program's name."""

    config: RunConfig
    arguments: tuple[str, ...]
    log_dir: Path
    nodes: int
    devices: int
    on_gpus: bool


def key_of(override: str) -> str:
    """The key that an override sets."""
    return override.partition("=")[0].lstrip("+~")


def override(key: str, value: object) -> str:
    """``key=value`` in Hydra's grammar."""
    return f"{key}={hydra_value(value)}"


def plan(recipe: Recipe, settings: SlurmConfig) -> Plan:
    """Compose and check a run that is requeued and resumed; its nodes and devices are the job's.

    Raises:
        ConfigError: a key or a combination that no run takes, or one that contradicts ``slurm.*``.
    """
    made = [override(key, path) for key, path in recipe.made]
    asked = compose.load_config(recipe.name, [*recipe.overrides, *made], recipe.config_dir)
    nodes = settings.nodes if settings.nodes is not None else asked.trainer.num_nodes
    gpus = settings.gpus_per_node
    if gpus is None:
        gpus = 0 if asked.trainer.accelerator == "cpu" else asked.trainer.devices
    devices = gpus or asked.trainer.devices
    log_dir = Path(os.path.abspath(log_directory(asked.exp_manager)))
    derived = {
        NODES: nodes,
        DEVICES: devices,
        ACCELERATOR: "gpu" if gpus else "cpu",
        LOG_DIR: log_dir,
        RESUME: True,
    }
    _refuse_contradictions(asked, {key_of(given) for given in recipe.overrides}, derived)
    _check_checkpoints(asked, settings)
    kept = [given for given in recipe.overrides if key_of(given) not in derived]
    final = [*kept, *made, *(override(key, value) for key, value in derived.items())]
    config = compose.load_config(recipe.name, final, recipe.config_dir)
    checks.check(_as_if_made(config, recipe.made))
    directory = [] if recipe.config_dir is None else ["--config-dir", os.path.abspath(recipe.config_dir)]
    arguments = ("train", *directory, "--config-name", recipe.name, *final)
    return Plan(config, arguments, log_dir, nodes, devices, bool(gpus))


def _as_if_made(config: RunConfig, made: tuple[tuple[str, Path], ...]) -> RunConfig:
    """The run with the initial model in the place of what earlier jobs will have made."""
    found = copy.deepcopy(config)
    for key, path in made:
        if not path.exists():
            section, _, name = key.rpartition(".")
            setattr(attrgetter(section)(found), name, config.model.restore_from_path)
    return found


def _refuse_contradictions(asked: RunConfig, given: set[str], derived: Mapping[str, object]) -> None:
    trainer, on_gpus = asked.trainer, derived[ACCELERATOR] == "gpu"
    for key, value, own in ((NODES, trainer.num_nodes, "nodes"), (DEVICES, trainer.devices, "gpus_per_node")):
        if key in given and value != derived[key]:
            raise ConfigError(f"{key}={value}: slurm.{own}={derived[key]} says otherwise; remove one of them")
    if trainer.accelerator not in ("auto", derived[ACCELERATOR]):
        remedy = "set slurm.gpus_per_node=0" if on_gpus else "remove slurm.gpus_per_node=0"
        raise ConfigError(f"{ACCELERATOR}={trainer.accelerator}: contradicts slurm.gpus_per_node; {remedy}")
    if RESUME in given and not asked.exp_manager.resume_if_exists:
        raise ConfigError(f"{RESUME}=false: a requeued job would end with an error; remove it")


def _check_checkpoints(asked: RunConfig, settings: SlurmConfig) -> None:
    manager = asked.exp_manager
    if settings.requeue and not manager.create_checkpoint_callback:
        raise ConfigError(
            "exp_manager.create_checkpoint_callback=false: a requeued job would begin again; remove it, or add "
            "slurm.requeue=false"
        )
    if settings.requeue and not manager.checkpoint_callback_params.every_n_train_steps:
        logger.warning(
            "exp_manager.checkpoint_callback_params.every_n_train_steps=0: checkpoints are saved when the job is told "
            "to stop, but a lost node loses all; set it to save on the way"
        )
