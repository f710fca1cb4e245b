"""``make paper-mini``: the paper's methods on a synthetic task that fits on two cores, and one table of them all."""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch.paper_mini_plan import (
    CONFIGS,
    METHODS,
    REWARD_MODEL,
    SFT,
    STAGES,
    Layout,
    Run,
    base_run,
    needed_beside_sft,
    stage_run,
    with_needs,
)
from megatron_aligndistil.launch.paper_mini_rates import SEED as RATES_SEED
from megatron_aligndistil.launch.paper_mini_rates import compare_rates
from megatron_aligndistil.launch.paper_mini_runs import cpu_seconds_of, train_all
from megatron_aligndistil.launch.paper_mini_task import (
    HELDOUT_TOPICS,
    MAX_NEW_TOKENS,
    READING,
    REWARD_RULE,
    SAMPLES,
    TOPICS,
    TRAIN_TOPICS,
    WRITING,
    demonstrations,
    preference_pairs,
    prompts,
    write_demonstrations,
)
from megatron_aligndistil.launch.quickstart_pairs import write_pairs

BATCH = 32  # the configs' pairs, demonstrations or prompts a step
ROLLOUT_STEPS = 8  # of ppo and rto: prompts_per_rollout / global_batch_size
VOCABULARY = 2048
SETTINGS_FILE, ANSWERS_FILE = "settings.json", "answers.jsonl"
LOCK_FILE = ".lock"  # held while a program works in the folder


@dataclass(frozen=True)
class Sizes:
    """Steps of every run, and of the base model's. Each row is seen once, so that they say how many there are."""

    steps: int
    base_steps: int


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. Errors of the user's are raised."""
    options = _parser().parse_args(arguments)
    _check(options)
    layout, sizes = Layout(options.output.expanduser().resolve()), Sizes(options.steps, options.base_steps)
    stages = with_needs([SFT, REWARD_MODEL, *options.methods])
    claim(layout, sizes)
    with alone_in(layout):
        seeds = [RATES_SEED] if options.learning_rates else list(range(1, options.seeds + 1))
        prepare(layout, seeds, sizes)
        train_all([base_run(layout)], 1)
        if options.learning_rates:
            compare_rates(layout, options.jobs)
            return 0
        runs = {(name, seed): stage_run(layout, name, seed) for seed in seeds for name in stages}
        train_all(list(runs.values()), options.jobs)
        methods = [name for name in METHODS if name in {SFT, *options.methods}]
        present(layout, methods, runs, sizes, options.jobs)
    return 0


def claim(layout: Layout, sizes: Sizes) -> None:
    """Make the output folder, which belongs to the first settings that it has seen.

    Raises:
        ConfigError: it holds runs of others, or something else.
    """
    configs = {path.name: path.read_text(encoding="utf-8") for path in sorted(CONFIGS.glob("*.yaml"))}
    text = json.dumps({"steps": sizes.steps, "base_steps": sizes.base_steps, "configs": configs}, indent=2) + "\n"
    root, path = layout.root, layout.root / SETTINGS_FILE
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise ConfigError(f"--output {root}: holds runs with other settings ({path}); give another folder")
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"--output {root}: exists and isn't a miniature's folder; give an empty or a new one")
    root.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


@contextmanager
def alone_in(layout: Layout) -> Iterator[None]:
    """Keep a second program from clearing the folders of runs that the first one trains.

    Raises:
        ConfigError: another one is at work.
    """
    with (layout.root / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"--output {layout.root}: another paper_mini.py is at work in it; wait, or give another folder"
            ) from None
        yield


def prepare(layout: Layout, seeds: Sequence[int], sizes: Sizes) -> None:
    """Write all rows and the base model's random weights. The same sizes and seeds write the same."""
    from transformers.utils import logging as transformers_logging

    from megatron_aligndistil.launch.quickstart_tiny import random_model, train_tokenizer

    transformers_logging.disable_progress_bar()
    reading = demonstrations(sizes.base_steps * BATCH, TOPICS, READING, seed=0)
    layout.reading.parent.mkdir(exist_ok=True)
    write_demonstrations(reading, layout.reading)
    for seed in seeds:
        rows = demonstrations(sizes.steps * BATCH, TRAIN_TOPICS, WRITING, seed)
        write_demonstrations(rows, layout.data("demonstrations", seed))
        write_pairs(preference_pairs(sizes.steps * BATCH, seed), layout.data("pairs", seed))
    if not layout.random_is_whole:
        tokenizer = train_tokenizer(
            [text for prompt, answer in reading for text in (prompt.question, answer)], VOCABULARY
        )
        tokenizer.save_pretrained(layout.random)
        random_model(tokenizer, seed=0).save_pretrained(layout.random)


def present(
    layout: Layout, methods: Sequence[str], runs: Mapping[tuple[str, int], Run], sizes: Sizes, jobs: int
) -> None:
    """Measure every method's model of every seed, write the results and print the report."""
    # Imported only now: torch would be loaded while the ranks want the cores.
    from megatron_aligndistil.launch.paper_mini_evaluation import Task, evaluate
    from megatron_aligndistil.report.paper_mini import JSON_FILE, Figures, Results, report, write

    seeds = sorted({seed for _, seed in runs})
    tasks = [
        Task(layout.random, {name: layout.model(name, seed) for name in methods}, layout.model(REWARD_MODEL, seed))
        for seed in seeds
    ]
    figures: dict[str, dict[int, Figures]] = {name: {} for name in methods}
    lines = []
    print(f"measuring {len(methods)} models of each of {len(seeds)} seeds", flush=True)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(evaluate, tasks))
    for seed, by_name in zip(seeds, found, strict=True):
        for name, measured in by_name.items():
            own = cpu_seconds_of(runs[name, seed])
            before = sum(cpu_seconds_of(runs[need, seed]) for need in needed_beside_sft(name))
            figures[name][seed] = measured.figures(own, before)
            lines += [json.dumps({"method": name, "seed": seed, **row}) for row in measured.rows()]
    results = Results(
        titles={name: STAGES[name].title for name in methods},
        figures=figures,
        notes=notes(sizes),
        settings={"steps": sizes.steps, "base_steps": sizes.base_steps, "batch": BATCH, "reward": REWARD_RULE},
    )
    write_text(layout.root / ANSWERS_FILE, "\n".join(lines) + "\n")
    write(results, layout.root)
    print(f"\n{report(results)}\n\n{layout.root / JSON_FILE}", flush=True)


def notes(sizes: Sizes) -> list[str]:
    """What the report says about the task."""
    return [
        f"True reward: {REWARD_RULE}. Training sees it through preferences alone: {sizes.steps * BATCH} pairs a seed, "
        "drawn by Bradley-Terry from the difference of their rewards.",
        f"Each run sees {sizes.steps * BATCH} demonstrations, pairs or prompts once, {BATCH} a step.",
        f"Answers: {SAMPLES} to each of {len(prompts(HELDOUT_TOPICS))} questions on the {len(HELDOUT_TOPICS)} held-out "
        f"topics, at temperature 1, up to {MAX_NEW_TOKENS} tokens. Win rate: of all pairs of a model's and the SFT "
        "model's answers to a question, by the true reward; a tie counts half.",
    ]


def _check(options: argparse.Namespace) -> None:
    for name, low in (("seeds", 1), ("steps", ROLLOUT_STEPS), ("base_steps", 1), ("jobs", 1)):
        if getattr(options, name) < low:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {low}")
    if options.steps % ROLLOUT_STEPS:
        raise ConfigError(
            f"--steps {options.steps}: must be a multiple of {ROLLOUT_STEPS}, the steps of PPO's rollouts"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the paper's methods on a synthetic task and compare them.")
    parser.add_argument("--output", type=Path, default=Path("runs/paper_mini"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 1, 2, … (default: %(default)s)")
    parser.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        default=list(METHODS),
        help=f"separated by commas; what they need is trained too (default: {','.join(METHODS)})",
    )
    parser.add_argument(
        "--steps", type=int, default=64, help="of every run but the base model's (default: %(default)s)"
    )
    parser.add_argument("--base-steps", type=int, default=750, help="of the base model (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (default: %(default)s)")
    parser.add_argument(
        "--learning-rates",
        action="store_true",
        help=f"only compare learning rates by training loss, on seed {RATES_SEED}",
    )
    return parser
