"""``aligndistil certify``: kernels and algorithms in this layout against dense float64, as a table or as JSON."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.config.certify import CertifyConfig, as_run, check_processes
from megatron_aligndistil.config.compose import load_overrides
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import failures, torchrun
from megatron_aligndistil.launch.log import configure_logging

if TYPE_CHECKING:
    from megatron_aligndistil.certificate.findings import Finding

# Where rank 0 leaves the exit code for our launcher, whose ranks all end well.
_VERDICT_VARIABLE = "ALIGNDISTIL_VERDICT"
_STDOUT = "-"


def main(argv: Sequence[str]) -> int:
    """Certify the layout that ``argv`` describes; 0 where everything passed, 1 where a check failed.

    Raises:
        ConfigError: an unknown key, a value or a combination that no run takes, or a file that cannot be written.
    """
    overrides, json_file = _arguments(argv)
    config = load_overrides(CertifyConfig, overrides, "certify")
    placement = torchrun.placement_from(os.environ)
    world = None if placement is None else placement.world_size
    run = as_run(config, world, _processes_a_node(os.environ))
    _check_writable(json_file)
    configure_logging(0 if placement is None else placement.rank)
    if placement is None and run.trainer.num_nodes * run.trainer.devices > 1:
        _check_processes(run)
        return _launch(argv, run)
    with torchrun.entered(placement or torchrun.alone(), run):
        _check_processes(run)
        with _stdout_to_stderr():
            findings = _certify(config, run)
        if int(os.environ["RANK"]) == 0:
            _show(findings, json_file)
        code = 0 if all(finding.passed for finding in findings) else 1
        if _VERDICT_VARIABLE not in os.environ:
            return code
        if int(os.environ["RANK"]) == 0:
            Path(os.environ[_VERDICT_VARIABLE]).write_text(str(code))
        return 0


def _launch(argv: Sequence[str], run: RunConfig) -> int:
    with tempfile.TemporaryDirectory(prefix="aligndistil-") as folder:
        verdict = Path(folder) / "verdict"
        os.environ[_VERDICT_VARIABLE] = str(verdict)
        try:
            code = torchrun.launch(("-m", "megatron_aligndistil", "certify", *argv), run)
        finally:
            del os.environ[_VERDICT_VARIABLE]
        return code or int(verdict.read_text())


def _certify(config: CertifyConfig, run: RunConfig) -> list[Finding]:
    from megatron_aligndistil.certificate.suite import Request, certify
    from megatron_aligndistil.parallel import setup

    model = run.model
    layout = setup.Layout.of(model)
    setup.initialize(layout, model.seed, run.trainer.accelerator, run.trainer.timeout_minutes)
    try:
        return certify(
            Request(
                layout,
                micro_batch_size=model.micro_batch_size,
                packed=model.data.batching == "packed",
                precision=config.trainer.precision,
                kernel=model.kernel,
            )
        )
    finally:
        setup.shutdown()


def _show(findings: Sequence[Finding], json_file: str | None) -> None:
    from megatron_aligndistil.certificate.findings import HEADER, rows, summary, to_json
    from megatron_aligndistil.report.table import markdown_table

    if json_file == _STDOUT:
        print(to_json(findings), end="", flush=True)
        return
    if json_file is not None:
        write_text(Path(json_file), to_json(findings))
    print(markdown_table(HEADER, rows(findings)), summary(findings), sep="\n\n", flush=True)


def _check_writable(json_file: str | None) -> None:
    if json_file in (None, _STDOUT):
        return
    path = Path(str(json_file))
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--json {json_file}: no file can be written there; name one in a folder that exists")


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What libraries print while they work is no part of the answer; gloo prints below Python."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _check_processes(run: RunConfig) -> None:
    import torch

    check_processes(run, torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _processes_a_node(environment: Mapping[str, str]) -> int | None:
    given = environment.get("LOCAL_WORLD_SIZE") or environment.get("SLURM_NTASKS_PER_NODE")
    return int(given) if given else None


def _arguments(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Hydra overrides, and where JSON goes."""
    parser = argparse.ArgumentParser(
        prog=f"{failures.PROGRAM} certify",
        description="Check value, gradient, traffic and memory of every kernel and algorithm on this layout.",
        epilog=(
            "examples:\n"
            "  aligndistil certify\n"
            "  aligndistil certify model.tensor_model_parallel_size=2 --json findings.json\n"
            "  torchrun --nproc-per-node 4 -m megatron_aligndistil certify \\\n"
            "      model.tensor_model_parallel_size=4 model.sequence_parallel=true\n\n"
            "Small random models; bounds are 1e-10 in float64, 1e-5 in fp32, and in bf16 the error of the plain\n"
            "formulation. The exit code is 1 where a check fails."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="write a list of findings; without FILE, print it alone",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="trainer.* and model.* keys of the layout")
    arguments = parser.parse_intermixed_args(argv)
    overrides, json_file = list(arguments.overrides), arguments.json
    if json_file is not None and "=" in json_file:  # an override that follows a bare --json
        overrides, json_file = [json_file, *overrides], _STDOUT
    return overrides, json_file
