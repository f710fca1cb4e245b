"""``aligndistil launch slurm``: a run, or the whole recipe, as Slurm jobs that save, requeue and go on."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_aligndistil.config import slurm_rules
from megatron_aligndistil.config.compose import load_overrides, recipe_names
from megatron_aligndistil.config.slurm_schema import SlurmConfig, SlurmLaunchConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import failures, slurm_queue
from megatron_aligndistil.launch.slurm_chain import STAGES, Request, chain, stage_of
from megatron_aligndistil.launch.slurm_plan import Recipe, key_of, plan
from megatron_aligndistil.launch.slurm_queue import Submitted
from megatron_aligndistil.launch.slurm_script import Job, Task, render

_DEFAULTS = "slurm_defaults"  # what a YAML file of slurm settings begins with


def main(argv: Sequence[str]) -> int:
    """Render, submit and follow what the arguments after ``launch`` describe; returns the exit code.

    Raises:
        ConfigError: a run that cannot start, settings that cannot be used, or what Slurm refuses.
    """
    arguments = _parser().parse_intermixed_args(argv)
    made_by = " ".join(f"{failures.PROGRAM} launch {shlex.join(argv)}".split())
    jobs = _chain(arguments, made_by) if arguments.chain else (_single(arguments, made_by),)
    if arguments.print:
        for place, job in enumerate(jobs):
            if len(jobs) > 1:
                print(f"# ==== {job.script} {_waits_for(jobs, place)}".rstrip())
            print(render(job), end="\n" if place < len(jobs) - 1 else "")
        return 0
    slurm_queue.require_slurm()
    numbers: list[str] = []
    submitted: dict[str, list[Submitted]] = {}
    for job in jobs:
        number, tasks = slurm_queue.submit(job, numbers[-1:])
        numbers.append(number)
        submitted[str(job.script)] = tasks
    slurm_queue.announce(submitted)
    if not arguments.follow:
        return 0
    return slurm_queue.follow([task for tasks in submitted.values() for task in tasks])


def _single(arguments: argparse.Namespace, made_by: str) -> Job:
    if arguments.config_name is None:
        raise ConfigError(
            f"--config-name: missing; name a recipe ({', '.join(recipe_names())}) or your own, or --chain"
        )
    for text in arguments.overrides:
        stage, bare = stage_of(text)
        if stage is not None:
            raise ConfigError(f"{text}: the stages are --chain's; add it, or write {bare}")
    settings = _settings(arguments, [text for text in arguments.overrides if key_of(text).startswith("slurm.")])
    own = tuple(text for text in arguments.overrides if not key_of(text).startswith("slurm."))
    run = plan(Recipe(arguments.config_name, arguments.config_dir, own), settings)
    name = run.config.exp_manager.name
    folder = Path(os.path.abspath(settings.log_dir)) if settings.log_dir else run.log_dir / "slurm"
    task = Task(name, run.arguments, run.log_dir)
    file = re.sub(r"[^\w.-]+", "_", name)
    return Job(file, (task,), run.nodes, run.devices, run.on_gpus, settings, folder, made_by)


def _chain(arguments: argparse.Namespace, made_by: str) -> tuple[Job, ...]:
    def settings_of(overrides: Sequence[str]) -> SlurmConfig:
        return _settings(arguments, overrides)

    request = Request(arguments.config_name, arguments.config_dir, tuple(arguments.overrides), settings_of, made_by)
    found = chain(request)
    for name in found.finished:
        print(f"# {name}: has ended by these settings, and is left out")
    return found.jobs


def _settings(arguments: argparse.Namespace, overrides: Sequence[str]) -> SlurmConfig:
    own = None
    if arguments.slurm_config is not None:
        path = Path(arguments.slurm_config).expanduser()
        if not path.is_file():
            raise ConfigError(f"--slurm-config {arguments.slurm_config}: no such file; correct the path")
        own = (path.stem, path.parent)
    settings = load_overrides(SlurmLaunchConfig, overrides, _DEFAULTS, own).slurm
    slurm_rules.check(settings)
    return settings


def _waits_for(jobs: Sequence[Job], place: int) -> str:
    return f"(after {jobs[place - 1].name}, --kill-on-invalid-dep=yes)" if place else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{failures.PROGRAM} launch",
        description="Submit a run to Slurm. It saves and requeues itself before the time limit, and goes on.",
        epilog=(
            "examples:\n"
            "  aligndistil launch slurm --config-name dpo model.restore_from_path=<model folder> \\\n"
            "      'model.data.data_prefix.train=[pairs.jsonl]' slurm.nodes=2 slurm.gpus_per_node=8\n"
            "  aligndistil launch slurm --chain exp_manager.explicit_log_dir=runs/recipe dpo:model.dpo.beta=0.05 …\n\n"
            "slurm.* are the job's, everything else the run's, as of 'aligndistil train'. --chain trains dpo beside\n"
            f"reverse_dpo, then aligndistil, exports and evaluates; <stage>:key=value is one stage's:\n"
            f"{', '.join(STAGES)}."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", choices=["slurm"], metavar="slurm")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="a recipe, or your own; of a chain AlignDistil's")
    parser.add_argument("--config-dir", "--config-path", "-cd", "-cp", metavar="DIR", help="a folder of your own YAML")
    parser.add_argument(
        "--slurm-config",
        metavar="FILE",
        help=f"YAML with slurm settings: 'defaults: [{_DEFAULTS}, _self_]', slurm: {{…}}",
    )
    parser.add_argument("--chain", action="store_true", help="all stages of the recipe, each after the one before")
    parser.add_argument("--print", action="store_true", help="print the batch files and submit nothing")
    parser.add_argument("--follow", action="store_true", help="print logs and states to the end; ends as the job does")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, and slurm.*")
    return parser
