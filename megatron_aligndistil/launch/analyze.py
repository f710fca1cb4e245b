"""``aligndistil analyze``: the paper's tables about trained models, as Markdown, CSV, charts and settings."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_aligndistil import __version__
from megatron_aligndistil.config.analysis_rules import as_run, check
from megatron_aligndistil.config.analysis_schema import (
    ANALYSES,
    AnalysisConfig,
    ExtrapolationAnalysisConfig,
    RewardAccuracyAnalysisConfig,
    TokensAnalysisConfig,
)
from megatron_aligndistil.config.compose import load_overrides
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import failures, torchrun, variants
from megatron_aligndistil.launch.log import configure_logging
from megatron_aligndistil.launch.runtime import check_here

# Of each analysis: a module with models_of(config), measure(config, bench) and report(config, measured).
MODULES = {
    "reward_accuracy": "analyze_rewards",
    "extrapolation": "analyze_extrapolation",
    "tokens": "analyze_tokens",
}


def main(argv: Sequence[str]) -> int:
    """Run one analysis with the arguments after ``analyze`` and return the exit code.

    Raises:
        UserError: bad input, in one line.
    """
    arguments = _parser().parse_intermixed_args(argv)
    name = arguments.analysis
    own = None if arguments.config_name is None else (arguments.config_name, arguments.config_dir or ".")
    if own is None and arguments.config_dir is not None:
        raise ConfigError(f"--config-dir {arguments.config_dir}: has no effect without --config-name; add it")
    config = load_overrides(ANALYSES[name], arguments.overrides, name, own)
    check(config)
    run = as_run(config, _first_model(config))
    placement = torchrun.placement_from(os.environ)
    configure_logging(0 if placement is None else placement.rank)
    if isinstance(config, ExtrapolationAnalysisConfig):
        variants.train_all(config, can_start=placement is None)
    if placement is None and run.trainer.num_nodes * run.trainer.devices > 1:
        check_here(run)
        return torchrun.launch(("-m", "megatron_aligndistil", "analyze", *argv), run)
    with torchrun.entered(placement or torchrun.alone(), run):
        check_here(run)
        _analyse(name, config, run, argv)
    return 0


def _analyse(name: str, config: AnalysisConfig, run: RunConfig, argv: Sequence[str]) -> None:
    """Measure on every rank, and report on the first, which may take its time then: nobody waits for it any more."""
    from megatron_aligndistil.launch import analysis_bench

    start = time.perf_counter()
    module: Any = import_module(f"{__package__}.{MODULES[name]}")
    models = module.models_of(config)
    analysis_bench.check_models(run, models)
    analysis_bench.check_tokenizers(models)
    with analysis_bench.bench(run) as bench:
        measured = module.measure(config, bench)
    if int(os.environ["RANK"]) != 0:
        return
    report = module.report(config, measured)
    settings = {
        "analysis": name,
        "version": __version__,
        "arguments": list(argv),
        "processes": int(os.environ["WORLD_SIZE"]),
        "models": analysis_bench.shown_paths(models),
        "config": asdict(config),
        "seconds": round(time.perf_counter() - start, 1),
    }
    folder = Path(config.output).expanduser()
    report.write(folder, settings)
    print(f"{report.markdown}\n{folder}", flush=True)


def _first_model(config: AnalysisConfig) -> str:
    """Whose tokenizer reads the data: all have the same."""
    if isinstance(config, RewardAccuracyAnalysisConfig):
        path = config.models.dpo or config.models.reward_model
    elif isinstance(config, TokensAnalysisConfig):
        path = config.models.dpo
    else:
        assert isinstance(config, ExtrapolationAnalysisConfig)
        path = variants.training_of(config).model.aligndistil.dpo_path
    assert path is not None
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{failures.PROGRAM} analyze",
        description="Analyse trained models in a run's layout; writes tables, charts and settings to output=<folder>.",
        epilog=(
            "analyses:\n"
            "  reward_accuracy  how often each reward prefers the chosen response (Table 2)\n"
            "  extrapolation    trains constant weights beside the adaptive one and compares them (Table 3)\n"
            "  tokens           weight, TVD, reward and KL of every token of some responses\n\n"
            "example:\n"
            "  aligndistil analyze reward_accuracy output=table2 models.dpo=runs/dpo \\\n"
            "      models.reverse_dpo=runs/reverse models.reference=<model> 'analysis.test=[test.jsonl]'\n\n"
            "A YAML of your own begins with 'defaults: [<analysis>, _self_]'."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("analysis", choices=list(ANALYSES), metavar="analysis")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="a YAML of your own")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="where it is; default: the current folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides; config/analysis_schema.py lists all"
    )
    return parser
