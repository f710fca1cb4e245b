"""``aligndistil evaluate`` that is interrupted, killed or stopped by a scheduler, and its ranks on other nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from typing import Any

import psutil
import pytest

from megatron_aligndistil.parallel.ports import free_port
from tests.integration.analysis_setting import TP2, Setting, rows
from tests.integration.evaluating import arguments, evaluate, kept_in, more_vowels, pairwise
from tests.integration.program import LIMIT_SECONDS, run, start
from tests.unit.evaluation.judge_server import JudgeServer, serving


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("evaluate"))


def test_an_interruption_loses_no_judgment_and_asks_none_twice(setting: Setting) -> None:
    """Ctrl-C in the middle of the judgments, then a kill in the middle of them, then to the end."""

    def slowly(body: dict[str, Any]) -> str:
        time.sleep(0.25)
        return more_vowels(body)

    with serving(slowly) as server:
        argv = pairwise(setting, server, "interrupted", "judge.concurrency=2", f"cache_dir={setting.folder / 'third'}")
        for number, stop, code in ((4, signal.SIGINT, 130), (8, signal.SIGTERM, 130), (12, signal.SIGKILL, -9)):
            process = start("evaluate", *argv)
            deadline = time.monotonic() + LIMIT_SECONDS
            while len(server.asked) < number and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(process.pid, stop)
            _, errors = process.communicate(timeout=LIMIT_SECONDS)
            assert process.returncode == code, errors
            assert not (setting.folder / "interrupted" / "results.json").exists()
            if stop != signal.SIGKILL:
                assert max(Counter(server.prompts).values()) == 1
        before = len(server.asked)
        evaluate(*argv)
        asked = list(server.prompts)
        evaluate(*pairwise(setting, server, "one"))
        results = json.loads((setting.folder / "interrupted" / "results.json").read_text())
    counts = Counter(asked)
    # What a killed process was just being told is all that is asked again.
    assert sum(counts.values()) - len(counts) <= 2 and before < len(asked)
    assert results["judge"]["answered"] + results["judge"]["cached"] == len(counts)
    assert rows(setting.folder / "interrupted" / "pairwise.csv") == rows(setting.folder / "one" / "pairwise.csv")


@pytest.mark.slow
def test_a_launcher_that_is_asked_to_stop_keeps_what_is_under_way(setting: Setting) -> None:
    """It passes SIGTERM on again and again, while the first rank waits for its requests."""

    def slowly(body: dict[str, Any]) -> str:
        time.sleep(6.0)
        return more_vowels(body)

    cache = setting.folder / "fourth"
    with serving(slowly) as server:
        no_reward = "reward={source: null, path: null}"
        argv = pairwise(setting, server, "ended", "judge.concurrency=4", f"cache_dir={cache}", no_reward, *TP2)
        process = start("evaluate", *argv)
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(server.asked) < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        before = kept_in(cache)
        process.terminate()
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 143 and "ended by SIGTERM" in errors, errors
    assert kept_in(cache) - before == len(server.asked) == 4


def on_two_nodes(setting: Setting, server: JudgeServer, output: str) -> list[subprocess.Popen[str]]:
    """Launchers of one rank each, the judge asked by nobody before."""
    own = ("reward={source: null, path: null}", "judge.concurrency=2", "trainer.num_nodes=2")
    cache = f"cache_dir={setting.folder / output}-cache"
    return [start("evaluate", *pairwise(setting, server, output, *own, cache)) for _ in range(2)]


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_nodes_wait_while_the_first_rank_judges(
    setting: Setting, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_RDZV_ENDPOINT", f"127.0.0.1:{free_port()}")
    nodes: list[subprocess.Popen[str]] = []
    ranks: list[list[int]] = []

    def judge(body: dict[str, Any]) -> str:
        ranks.append([len(psutil.Process(node.pid).children()) for node in nodes])
        time.sleep(1.0)
        return more_vowels(body)

    output = f"nodes-{stopped}"
    with serving(judge) as server:
        nodes += on_two_nodes(setting, server, output)
        while stopped and len(ranks) < 4:
            time.sleep(0.1)
        for node in nodes if stopped else ():
            node.send_signal(signal.SIGTERM)
        ends = [(node.communicate(timeout=LIMIT_SECONDS)[1], node.returncode) for node in nodes]
    assert [code for _, code in ends] == [143 if stopped else 0] * 2, ends
    assert len(ranks) >= 4 and all(own == [1, 1] for own in ranks)
    assert (setting.folder / output / "results.json").exists() != stopped


def test_a_kill_among_the_answers_loses_those_under_way_alone(setting: Setting) -> None:
    cache = setting.folder / "kept"

    def argv(output: str, *overrides: str) -> list[str]:
        shared = (f"benchmark.prompts=[{setting.test}]", f"model={setting.models['model']}")
        function = ("reward.source=model", f"reward.path={setting.models['reward']}", "sampling.hf_batch_size=1")
        return arguments(setting, "reward", output, *shared, *function, "sampling.max_new_tokens=80", *overrides)

    process = start("evaluate", *argv("killed", f"cache_dir={cache}"))
    deadline = time.monotonic() + LIMIT_SECONDS
    while kept_in(cache) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    known = kept_in(cache)
    assert 3 <= known < 9 and process.returncode == -signal.SIGKILL
    finished = run("evaluate", *argv("killed", f"cache_dir={cache}"))
    assert finished.exit_code == 0 and f"9 answers, {known} known" in finished.errors, finished.errors
    evaluate(*argv("whole", f"cache_dir={setting.folder / 'other'}"))
    assert rows(setting.folder / "killed" / "reward.csv") == rows(setting.folder / "whole" / "reward.csv")
