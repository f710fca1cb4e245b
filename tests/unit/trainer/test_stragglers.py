"""Which rank is the slowest, and when that is worth a word."""

from __future__ import annotations

import json
import logging

import pytest

from megatron_aligndistil.trainer.stragglers import STRAGGLERS_FILE, StragglerReport, own_work, slowest


def test_the_wait_for_others_is_not_a_ranks_own_work():
    metrics = {"data_seconds": 1.0, "forward_backward_seconds": 5.0, "gradient_sync_seconds": 4.0, "step_seconds": 7.0}
    critic = {"critic_forward_backward_seconds": 3.0, "critic_gradient_sync_seconds": 1.0, "loss": 2.0}
    assert own_work(metrics | critic) == {"data": 1.0, "forward_backward": 1.0, "critic_forward_backward": 2.0}


def test_the_slowest_rank_and_the_median():
    assert slowest("data", [{"data": 1.0}, {"data": 4.0}, {"data": 2.0}]) == (1, 4.0, 2.0)


@pytest.mark.parametrize(("others", "warned"), [(2.0, True), (3.9, False)])
def test_only_a_straggler_is_warned_of(tmp_path, caplog, others, warned):
    report = StragglerReport(tmp_path, every_n_steps=1)
    report._steps = 10
    ranks = [(f"node{rank}", {"frozen": 4.0 if rank == 2 else others}, 10.0) for rank in range(4)]
    with caplog.at_level(logging.WARNING):
        report._report(20, ranks)
    line = json.loads((tmp_path / STRAGGLERS_FILE).read_text())
    assert line == {
        "step": 20,
        "steps": 10,
        "slowest": {"frozen": {"rank": 2, "host": "node2", "seconds": 4.0, "median_seconds": others}},
    }
    assert [record.getMessage() for record in caplog.records] == warned * [
        "straggler: frozen takes rank 2 (node2) 4.000 s a step, the median rank 2.000 s (10 steps up to step 20)"
    ]
