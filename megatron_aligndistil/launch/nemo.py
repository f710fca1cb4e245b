"""``aligndistil train`` with its configuration composed by NeMo: ``python -m megatron_aligndistil.launch.nemo``.

nemo-toolkit's ``hydra_runner`` is a decorator around a program. Here it is around a function that only keeps what was
composed: the run begins after it has returned, with our checks, our error lines and our ranks, and nothing of Hydra's
job (its folder, its logging, its way to report an exception) can have a say in it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import cli, failures
from megatron_aligndistil.launch.log import configure_logging

MODULE = "megatron_aligndistil.launch.nemo"
PACKAGE = "nemo-toolkit"


def main(argv: Sequence[str] | None = None) -> int:
    """As ``aligndistil train`` with the same arguments, and the same exit codes."""
    configure_logging(0)  # before NeMo is imported, whose own logger prints every warning that isn't ignored by then
    try:
        return cli.train(sys.argv[1:] if argv is None else argv, hydra_runner_composer, ("-m", MODULE))
    except (Exception, KeyboardInterrupt) as error:
        return failures.report(error)


def hydra_runner_composer(entry: Any) -> Any:
    """A ``config.compose.Composer``: what ``hydra_runner`` gives to the function that it decorates.

    Raises ConfigError where nemo-toolkit isn't installed, and Hydra's own errors.
    """
    hydra_runner = _hydra_runner()
    kept: list[Any] = []

    @hydra_runner(config_path=str(entry.folder), config_name=entry.name)
    def keep(composed: Any) -> None:
        kept.append(composed)

    with _command_line(entry.overrides), _quiet_root_logger():
        keep()
    return kept[0]


def _hydra_runner() -> Callable[..., Any]:
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)  # two lines a process: that there is no telemetry
    try:
        from nemo.core.config import hydra_runner
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{MODULE}: {PACKAGE} cannot be imported ({error}); install the extra 'nemo' ('make nemo' builds an "
            "environment with it), or use aligndistil train"
        ) from error
    runner: Callable[..., Any] = hydra_runner
    return runner


@contextmanager
def _command_line(overrides: Sequence[str]) -> Iterator[None]:
    """``hydra_runner`` reads ``sys.argv``, and would end the process with Hydra's own report of an error."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *overrides, "hydra.job.chdir=False"]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Hydra's job logging replaces the root logger's handlers and level."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
