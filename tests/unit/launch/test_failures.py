"""Which of several ranks' failures the user is shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_aligndistil.launch.failures import Failure, present

USER, BUG, LOSS = "user error", "bug", "peer loss"


def write(folder: Path, *failures: Failure) -> None:
    for failure in failures:
        (folder / f"rank-{failure.rank}.json").write_text(json.dumps(asdict(failure)))


@pytest.mark.parametrize(
    ("failures", "exit_codes", "code", "expected"),
    [
        (
            [Failure(0, 1.0, LOSS, "lost"), Failure(1, 2.0, USER, "a line")],
            {0: 1, 1: 2},
            2,
            "error: a line\n",
        ),
        (
            [Failure(0, 2.0, USER, "one"), Failure(1, 1.0, USER, "other")],
            {0: 2, 1: 2},
            2,
            "error: other\n",
        ),
        (
            [Failure(0, 1.0, LOSS, "lost"), Failure(1, 2.0, BUG, "trace")],
            {0: 1},
            1,
            "rank 1 failed, and 1 more with it:\ntrace\n",
        ),
        ([Failure(2, 1.0, BUG, "trace")], {2: 1, 0: -15}, 1, "rank 2 failed:\ntrace\n"),
        ([Failure(0, 1.0, LOSS, "lost")], {1: -11, 0: 1}, 1, "rank 1 was ended by SIGSEGV\n"),
        ([Failure(0, 1.0, BUG, "trace")], {0: -14, 1: -15}, 1, "rank 0 failed:\ntrace\n"),  # hung while exiting
        (
            [Failure(0, 2.0, "preemption", "stopped"), Failure(1, 1.0, "preemption", "stopped")],
            {0: 75, 1: 75},
            75,
            "stopped\n",
        ),
        (
            [Failure(0, 1.0, "preemption", "stopped"), Failure(1, 2.0, BUG, "trace")],
            {0: 75, 1: 1},
            1,
            "rank 1 failed, and 1 more with it:\ntrace\n",
        ),
        ([Failure(0, 1.0, LOSS, "lost"), Failure(1, 2.0, "hang", "hung there")], {0: 1, 1: 70}, 70, "hung there\n"),
        (
            [Failure(5, 1.0, USER, "a line", "other node"), Failure(0, 2.0, LOSS, "lost")],
            {0: 1},
            2,
            "ended with rank 5, whose node's log says why\n",
        ),
        ([], {1: 3}, 1, "rank 1 exited with 3 and left no report\n"),
    ],
)
def test_the_cause_is_shown(tmp_path, capsys, failures, exit_codes, code, expected):
    write(tmp_path, *failures)
    assert present(tmp_path, exit_codes) == code
    assert capsys.readouterr().err == f"aligndistil: {expected}"
