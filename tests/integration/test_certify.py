"""``aligndistil certify`` as a user runs it: what it prints, and its exit code where a loss is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.certificate.algorithms import ALGORITHM_CHECKS
from megatron_aligndistil.certificate.kernels import KERNELS
from megatron_aligndistil.parallel.ports import free_port
from tests.integration.program import LIMIT_SECONDS, environment

# One number type, plan and chunk size: the rest is in tests/distributed.
BRIEFLY = ("trainer.precision=32", "model.kernel.plan=store", "model.kernel.chunk_tokens=5")
ROOT = Path(__file__).resolve().parents[2]
TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
KEYS = {"name", "layout", "value_error", "gradient_error", "words_per_token", "peak_bytes", "passed"}

# The program with a merger that takes the first shard's words for the last one's.
WRONG_MERGER = """
import sys
import torch.distributed as dist
from megatron_aligndistil.launch import cli

gather = dist.all_gather

def without_the_last(parts, own, group=None):
    gather(parts, own, group=group)
    parts[-1].copy_(parts[0])

dist.all_gather = without_the_last
sys.exit(cli.main(["certify", *sys.argv[1:]]))
"""


def certify(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_aligndistil", "certify", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=LIMIT_SECONDS, check=False
    )


def certify_under_a_launcher(ranks: int, *arguments: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank of WRONG_MERGER, started as torchrun would."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        variables = {**environment(), "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, "-c", WRONG_MERGER, *arguments]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
        )
    try:
        outputs = [process.communicate(timeout=LIMIT_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def names(findings: list[dict[str, Any]]) -> set[str]:
    return {finding["name"] for finding in findings}


def test_a_table_of_one_process(tmp_path: Path) -> None:
    file = tmp_path / "findings.json"
    result = certify(*BRIEFLY, "--json", str(file))
    assert result.returncode == 0, result.stderr
    findings = json.loads(file.read_text())
    lines = result.stdout.splitlines()
    assert lines[0].startswith("| name ")
    assert len(lines) == 2 + len(findings) + 2
    assert lines[-1] == f"all {len(findings)} passed"
    assert all("tp1-pp1-dp1" in line and "pass" in line for line in lines[2:-2])
    assert names(findings) == {*KERNELS, *ALGORITHM_CHECKS}


def test_json_alone_and_a_failure_from_ranks_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are fresh interpreters: the mutation waits in their start-up."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'certify' in sys.orig_argv and 'RANK' in os.environ:\n"
        "    from megatron_aligndistil.losses import supervised\n"
        "    loss = supervised.supervised_loss\n"
        "    supervised.supervised_loss = lambda logprob_T: loss(logprob_T * 1.001)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    result = certify("--json", *BRIEFLY, *TP2, "trainer.devices=2")
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    findings = json.loads(result.stdout)
    assert all(set(finding) == KEYS for finding in findings)
    assert all(finding["layout"].startswith("tp2-pp1-dp1-sp") for finding in findings)
    assert names(findings) == {*KERNELS, *ALGORITHM_CHECKS}
    assert names([finding for finding in findings if not finding["passed"]]) == {"sft", "sft lora"}


@pytest.mark.slow
def test_a_wrong_merger_fails_on_every_rank_of_a_launcher() -> None:
    arguments = (*BRIEFLY, "model.tensor_model_parallel_size=2", "--json")
    (code, printed, errors), (other_code, other_printed, _) = certify_under_a_launcher(2, *arguments)
    assert code == other_code == 1, errors
    assert not other_printed
    findings = json.loads(printed)
    failed = names([finding for finding in findings if not finding["passed"]])
    sending = {name for name, check in ALGORITHM_CHECKS.items() if check.words}
    assert failed >= {"token_logprob", "token_kl to_other", "extrapolated_kl adaptive", *sending}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("model.tensor_paralel_size=2",), "did you mean model.tensor_model_parallel_size?"),
        (("--json", "model.sequence_parallel=true"), "needs model.tensor_model_parallel_size of at least 2"),
        (("--json", "/nowhere/findings.json"), "no file can be written there"),
    ],
)
def test_a_users_mistake_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = certify(*arguments)
    assert result.returncode == 2
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert line in result.stderr
