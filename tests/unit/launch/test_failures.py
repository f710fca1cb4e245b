"""Which of several ranks' failures the user is shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_aligndistil.launch.failures import Failure, present

USER = {"is_user_error": True, "is_peer_loss": False}
BUG = {"is_user_error": False, "is_peer_loss": False}
LOSS = {"is_user_error": False, "is_peer_loss": True}


def write(folder: Path, *failures: Failure) -> None:
    for failure in failures:
        (folder / f"rank-{failure.rank}.json").write_text(json.dumps(asdict(failure)))


@pytest.mark.parametrize(
    ("failures", "exit_codes", "code", "expected"),
    [
        (
            [Failure(0, 1.0, text="lost", **LOSS), Failure(1, 2.0, text="a line", **USER)],
            {0: 1, 1: 2},
            2,
            "error: a line\n",
        ),
        (
            [Failure(0, 2.0, text="one", **USER), Failure(1, 1.0, text="other", **USER)],
            {0: 2, 1: 2},
            2,
            "error: other\n",
        ),
        (
            [Failure(0, 1.0, text="lost", **LOSS), Failure(1, 2.0, text="trace", **BUG)],
            {0: 1},
            1,
            "rank 1 failed, and 1 more with it:\ntrace\n",
        ),
        ([Failure(2, 1.0, text="trace", **BUG)], {2: 1, 0: -15}, 1, "rank 2 failed:\ntrace\n"),
        ([Failure(0, 1.0, text="lost", **LOSS)], {1: -11, 0: 1}, 1, "rank 1 was ended by SIGSEGV\n"),
        ([Failure(0, 1.0, text="trace", **BUG)], {0: -14, 1: -15}, 1, "rank 0 failed:\ntrace\n"),  # hung while exiting
        ([], {1: 3}, 1, "rank 1 exited with 3 and left no report\n"),
    ],
)
def test_the_cause_is_shown(tmp_path, capsys, failures, exit_codes, code, expected):
    write(tmp_path, *failures)
    assert present(tmp_path, exit_codes) == code
    assert capsys.readouterr().err == f"aligndistil: {expected}"
