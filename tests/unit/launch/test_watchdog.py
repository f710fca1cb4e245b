"""What is said of a hang: who is behind, who gives no answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_aligndistil.launch.watchdog import Whereabouts, describe


def at(phase: str, number: int, waits: bool) -> Whereabouts:
    return Whereabouts(phase, number, 61.4, "distributed_c10d.py:3 all_reduce" if waits else "loss.py:8 loss", waits)


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (
            {0: at("sync", 9, True), 1: at("frozen", 8, True), 2: at("sync", 9, True)},
            "the others wait for rank 1, in frozen",
        ),
        (
            {0: at("sync", 9, True), 1: at("sync", 9, False), 2: at("sync", 9, True)},
            "the others wait for rank 1, in sync",
        ),
        ({0: at("a", 1, True), 1: at("a", 1, True), 2: at("b", 2, False)}, "the others wait for ranks 0, 1, in a"),
        ({rank: at("sync", 9, True) for rank in range(3)}, "all ranks are in sync"),
        (
            {0: at("sync", 9, True), 1: at("sync", 9, True)},
            "rank 2 gave no answer: stopped, or on a machine that is away",
        ),
        ({}, "ranks 0, 1, 2 gave no answer: stopped, or on a machine that is away"),
    ],
)
def test_the_cause(found, cause):
    first, *others = describe(found, 3, 60, Path("runs/x/hang")).splitlines()
    assert first == (
        f"hung: a phase took longer than 60 s (trainer.timeout_minutes); {cause}; every rank's stack is in runs/x/hang"
    )
    assert sorted(others) == [
        f"  rank {rank}: {where.phase} for 61 s, at {where.frame}" for rank, where in sorted(found.items())
    ]


def test_a_thousand_ranks_do_not_fill_the_screen():
    text = describe({rank: at("sync", 9, True) for rank in range(1000)}, 1024, 60, Path("hang"))
    assert len(text.splitlines()) == 18 and text.endswith("  and 984 more")
    assert "ranks 1000, 1001" in text and "1015, …" in text and "1016" not in text
