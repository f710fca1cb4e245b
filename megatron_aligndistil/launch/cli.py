"""The program ``aligndistil``. Whatever needs torch is imported only once a command does."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from megatron_aligndistil import __version__
from megatron_aligndistil.launch import failures, torchrun
from megatron_aligndistil.launch.log import configure_logging
from megatron_aligndistil.launch.log_folder import log_directory
from megatron_aligndistil.launch.runtime import check_here

if TYPE_CHECKING:
    from megatron_aligndistil.config.compose import Composer


@dataclass(frozen=True)
class Command:
    """A subcommand: ``run`` takes the arguments after its name and returns the exit code."""

    name: str
    summary: str
    run: Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for the user's mistake (one line on stderr), 1 for a bug."""
    arguments = _parser().parse_args(argv)
    command = next(command for command in COMMANDS if command.name == arguments.command)
    try:
        return command.run(arguments.arguments)
    except (Exception, KeyboardInterrupt) as error:
        return failures.report(error)


def train(
    argv: Sequence[str],
    composer: Composer | None = None,
    command: Sequence[str] = ("-m", "megatron_aligndistil", "train"),
) -> int:
    """``aligndistil train``: compose and check the run, then be a rank of it or start its ranks.

    ``composer`` replaces Hydra's compose; ``command`` then names the module whose ``argv`` the ranks are started with.
    """
    from megatron_aligndistil.config import checks, compose

    arguments = _train_parser(compose.recipe_names()).parse_intermixed_args(argv)
    by = composer or compose.compose_api
    selected = (arguments.config_name, arguments.overrides, arguments.config_dir, by)
    if arguments.cfg == "job":
        print(compose.describe_config(*selected), end="")
        return 0
    config = compose.load_config(*selected)
    checks.check(config)
    log_directory(config.exp_manager)  # refuses two of them before any process starts
    placement = torchrun.placement_from(os.environ)
    configure_logging(0 if placement is None else placement.rank)
    if placement is None and config.trainer.num_nodes * config.trainer.devices > 1:
        check_here(config)
        return torchrun.launch((*command, *argv), config)
    with torchrun.entered(placement or torchrun.alone(), config):
        check_here(config)
        from megatron_aligndistil.launch import assemble
        from megatron_aligndistil.launch.watchdog import Watchdog
        from megatron_aligndistil.trainer.interruption import Interruption

        watchdog = Watchdog(60 * config.trainer.timeout_minutes, log_directory(config.exp_manager))
        with watchdog, Interruption().listening() as interruption:
            assemble.run(config, interruption)
    return 0


def _elsewhere(module: str) -> Callable[[Sequence[str]], int]:
    """A command whose ``main(argv)`` is in a module that is imported only when it runs."""

    def run(argv: Sequence[str]) -> int:
        configure_logging(0)
        return import_module(module).main(argv) or 0

    return run


COMMANDS = (
    Command("train", "train a model by a recipe (aligndistil, dpo, ppo, …) or your own YAML", train),
    Command(
        "convert",
        "convert a model between Hugging Face and Megatron folders",
        _elsewhere("megatron_aligndistil.checkpoint.convert"),
    ),
    Command(
        "certify",
        "check losses, gradients and traffic of this machine's layout against dense float64",
        _elsewhere("megatron_aligndistil.launch.certify"),
    ),
    Command(
        "evaluate",
        "evaluate models by AlpacaEval 2, MT-Bench, Arena-Hard, TL;DR, pairwise or a reward, with any judge",
        _elsewhere("megatron_aligndistil.launch.evaluate"),
    ),
    Command(
        "analyze",
        "reward accuracy, constant against adaptive weights, win rates, token figures of trained models",
        _elsewhere("megatron_aligndistil.launch.analyze"),
    ),
    Command(
        "launch",
        "submit a run, or the whole recipe as a chain, to Slurm",
        _elsewhere("megatron_aligndistil.launch.slurm"),
    ),
    Command(
        "config-from-nemo",
        "translate a NeMo-Aligner configuration, and list what has no equal",
        _elsewhere("megatron_aligndistil.launch.config_from_nemo"),
    ),
    Command(
        "quickstart",
        "align a small model end to end on this machine",
        _elsewhere("megatron_aligndistil.launch.quickstart"),
    ),
)


def _parser() -> argparse.ArgumentParser:
    summaries = "\n".join(f"  {command.name:<18}{command.summary}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog=failures.PROGRAM,
        description="Token-level alignment of language models on Megatron-Core.",
        epilog=f"commands:\n{summaries}\n\n'{failures.PROGRAM} <command> --help' explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=[command.name for command in COMMANDS], metavar="command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    return parser


def _train_parser(recipes: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{failures.PROGRAM} train",
        description="Train by a recipe. Starts its own ranks, unless torchrun or srun has.",
        epilog=(
            "example:\n"
            "  aligndistil train --config-name dpo model.restore_from_path=<model folder> \\\n"
            "      'model.data.data_prefix.train=[pairs.jsonl]' \\\n"
            "      trainer.devices=2 model.tensor_model_parallel_size=2\n\n"
            "A YAML of your own begins with 'defaults: [dpo, _self_]' and is found by --config-dir."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config-name", "-cn", required=True, metavar="NAME", help=f"a recipe: {', '.join(recipes)}; or your own"
    )
    parser.add_argument(
        "--config-dir", "--config-path", "-cd", "-cp", metavar="DIR", help="a folder with YAML files of your own"
    )
    parser.add_argument("--cfg", "-c", choices=["job"], help="job: print the resolved config and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides; --cfg job prints every key")
    return parser
