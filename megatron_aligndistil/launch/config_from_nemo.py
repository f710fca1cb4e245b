"""``aligndistil config-from-nemo``: a NeMo-Aligner configuration as a YAML file of ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.config.nemo_translation import translate
from megatron_aligndistil.config.yaml_files import recipe_names
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import failures


def main(argv: Sequence[str]) -> int:
    """Translate one file; the account of what became of its keys is printed to stderr and heads the YAML."""
    arguments = _parser().parse_args(argv)
    output: Path | None = arguments.output
    if output is not None and output.exists():
        raise ConfigError(f"--output {output}: exists; name another file")
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: no folder {output.parent}; make it first")
    made = translate(arguments.file, arguments.algorithm)
    for line in made.account():
        print(line, file=sys.stderr)
    if output is None:
        print(made.yaml(), end="")
    else:
        write_text(output, made.yaml())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{failures.PROGRAM} config-from-nemo",
        description="Translate a NeMo-Aligner YAML to a recipe and the keys that differ. docs/nemo.md has the table.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="such as gpt_dpo.yaml; what Hydra would merge into it must be in it")
    parser.add_argument("--output", type=Path, metavar="YAML", help="a new file; default: print it")
    parser.add_argument(
        "--algorithm",
        choices=recipe_names(),
        metavar="RECIPE",
        help=f"where the file doesn't say, or another is meant: {', '.join(recipe_names())}",
    )
    return parser
