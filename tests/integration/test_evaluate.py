"""``aligndistil evaluate`` as a user runs it: answers, judgments, an interruption, two ranks, and bad input."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.evaluation.content_cache import FILE
from tests.integration.analysis_setting import TP2, Setting, rows
from tests.integration.program import LIMIT_SECONDS, run, start
from tests.unit.evaluation.judge_server import JudgeServer, serving

SHORT = "sampling.max_new_tokens=6"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("evaluate"))


def vowels(text: str) -> int:
    return sum(letter in "aeiou" for letter in text)


def more_vowels(body: dict[str, Any]) -> str:
    """The answer with more vowels, or what can't be read."""
    _, first, second = body["messages"][0]["content"].split("<>")
    more = vowels(first) - vowels(second)
    return "[[A]]" if more > 0 else "[[B]]" if more < 0 else "hm"


def arguments(setting: Setting, benchmark: str, output: str, *overrides: str) -> list[str]:
    """What follows ``evaluate``."""
    (setting.folder / "prompt.txt").write_text("{question}<>{answer_a}<>{answer_b}")
    return [
        *setting.arguments(benchmark, output, SHORT),
        f"cache_dir={setting.folder / 'answers'}",
        *overrides,
    ]


def pairwise(setting: Setting, server: JudgeServer, output: str, *overrides: str) -> list[str]:
    return arguments(
        setting,
        "pairwise",
        output,
        f"+models.sft={setting.models['model']}",
        f"+models.aligned={setting.models['dpo']}",
        f"benchmark.prompts=[{setting.test}]",
        f"benchmark.judge_prompt={setting.folder / 'prompt.txt'}",
        "reward.source=model",
        f"reward.path={setting.models['reward']}",
        f"judge.base_url={server.url}",
        "judge.model=tiny",
        *overrides,
    )


def text_of(setting: Setting, output: str) -> str:
    """The Markdown report."""
    (report,) = (setting.folder / output).glob("*.md")
    return report.read_text()


def evaluate(*argv: str) -> None:
    finished = run("evaluate", *argv)
    assert finished.exit_code == 0, finished.errors


def test_pairwise_by_judge_and_reward_in_one_rank_and_two(setting: Setting) -> None:
    with serving(more_vowels) as server:
        evaluate(*pairwise(setting, server, "one"))
        asked = len(server.asked)
        # The answers are known, and so are the judgments: nothing is drawn or asked again.
        evaluate(*pairwise(setting, server, "two", *TP2))
        assert len(server.asked) == asked > 0
        evaluate(*pairwise(setting, server, "drawn-by-two", f"cache_dir={setting.folder / 'fresh'}", *TP2))
    one, two, drawn = (rows(setting.folder / name / "pairwise.csv") for name in ("one", "two", "drawn-by-two"))
    for other in (two, drawn):
        for row, same in zip(one, other, strict=True):
            assert (row["model"], row["quantity"]) == (same["model"], same["quantity"])
            assert float(row["value"]) == pytest.approx(float(same["value"]), abs=1e-6)
    folder = setting.folder / "one"
    answers = [json.loads(line)["answers"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    found = {(row["model"], row["quantity"]): float(row["value"]) for row in one}
    wins = [
        (a["aligned"]["reward"] > a["sft"]["reward"]) + 0.5 * (a["aligned"]["reward"] == a["sft"]["reward"])
        for a in answers
    ]
    assert len(wins) == 9 and found["aligned", "reward_win_rate"] == pytest.approx(sum(wins) / 9)
    assert found["sft", "length"] == pytest.approx(sum(a["sft"]["tokens"] for a in answers) / 9)
    orders = [vowels(a["aligned"]["text"]) - vowels(a["sft"]["text"]) for a in answers]
    assert found["aligned", "unreadable"] == 2 * orders.count(0)
    told = [order for order in orders if order]
    assert found["aligned", "judge_win_rate"] == pytest.approx(sum(order > 0 for order in told) / len(told))
    results = json.loads((folder / "results.json").read_text())
    assert results["models"]["aligned"]["judge_win_rate"]["value"] == pytest.approx(
        found["aligned", "judge_win_rate"], rel=1e-6
    )
    assert results["judge"]["answered"] == len({str(own) for own in server.asked[:asked]})
    assert results["answers"]["sft"]["answers"] == 9 and results["judge"]["prompt_tokens"] > 0
    again = json.loads((setting.folder / "two" / "results.json").read_text())
    assert (again["judge"]["answered"], again["judge"]["cached"]) == (0, results["judge"]["answered"])
    judgments = [json.loads(line) for line in (folder / "judgments" / "aligned.jsonl").read_text().splitlines()]
    assert len(judgments) == 9 and {"[[A]]", "[[B]]"} & {said for row in judgments for said in row["said"]}
    assert json.loads((folder / "settings.json").read_text())["config"]["judge"]["model"] == "tiny"


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
        if not (setting.folder / "one").exists():
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


def test_summaries_rewards_and_ready_answers(setting: Setting) -> None:
    ready = setting.folder / "ready.jsonl"
    prompts = [json.loads(line)["prompt"] for line in setting.test.read_text().splitlines()]
    ready.write_text("".join(json.dumps({"prompt": text, "answer": "aeiou red"}) + "\n" for text in prompts))
    shared = (f"benchmark.prompts=[{setting.test}]", f"model={setting.models['model']}", f"+outputs.ready={ready}")
    with serving(lambda body: "[[B]]" if "B]\naeiou" in body["messages"][0]["content"] else "[[A]]") as server:
        judge = (f"judge.base_url={server.url}", "judge.model=tiny", "benchmark.baseline=model")
        evaluate(*arguments(setting, "tldr", "tldr", *shared, *judge))
    results = json.loads((setting.folder / "tldr" / "results.json").read_text())["models"]
    assert results["ready"]["judge_win_rate"]["value"] == 1.0 and results["ready"]["answer_tokens"]["value"] is None
    measure = ("reward.source=model", f"reward.path={setting.models['reward']}")
    tight = ("model.encoder_seq_length=16", "model.data.max_prompt_length=8")  # room for few whole prompts
    evaluate(*arguments(setting, "reward", "reward", *shared, *measure, *tight))
    results = json.loads((setting.folder / "reward" / "results.json").read_text())
    assert 0 < results["answers"]["model"]["cut_prompts"] <= 9 and "prompts cut" in text_of(setting, "reward")
    assert {name for name, own in results["models"].items() if own["reward"]["value"] is not None} == {"model", "ready"}
    assert "mean reward" in text_of(setting, "reward") and "win rate over" not in text_of(setting, "reward")


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


def kept_in(cache: Path) -> int:
    """How many values a cache has, as another process sees it."""
    if not (cache / FILE).exists():
        return 0
    with closing(sqlite3.connect(cache / FILE, timeout=60)) as connection:
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return int(connection.execute("SELECT count(*) FROM made").fetchone()[0]) if tables else 0


def test_a_judge_that_cannot_be_read_has_no_figures(setting: Setting) -> None:
    with serving(lambda body: "hm", model="mumbler") as server:  # none of whose words are known from other tests
        evaluate(*pairwise(setting, server, "unread", "judge.model=mumbler", "reward={source: null, path: null}"))
    results = json.loads((setting.folder / "unread" / "results.json").read_text())["models"]["aligned"]
    assert results["judge_win_rate"] == {"value": None, "low": None, "high": None} and results["unreadable"] == 18
    assert "aligned 18" in text_of(setting, "unread") and not list((setting.folder / "unread").glob("*.svg"))


def test_a_rank_but_the_first_neither_asks_nor_writes(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for name, value in {**placement, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    output = setting.folder / "second-rank"
    with serving(lambda body: "[[A]]") as server:
        judge = (f"judge.base_url={server.url}", "judge.model=tiny", f"cache_dir={output / 'cache'}")
        evaluate("judge-agreement", f"output={output}", f"benchmark.pairs=[{setting.test}]", *judge)
    assert not server.asked and not (output / "results.json").exists()


def test_a_judge_against_labels(setting: Setting) -> None:
    with serving(lambda body: "[[A]]") as server:
        evaluate(
            "judge-agreement",
            f"output={setting.folder / 'agreement'}",
            f"cache_dir={setting.folder / 'answers'}",
            f"benchmark.pairs=[{setting.test}]",
            f"judge.base_url={server.url}",
            "judge.model=tiny",
        )
    found = json.loads((setting.folder / "agreement" / "results.json").read_text())["models"]["tiny"]
    assert (found["agreement"]["value"], found["prefers_first"]["value"]) == (0.5, 1.0)
    assert len((setting.folder / "agreement" / "judgments.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["pairwise", "output=x"], "model=null: nothing to evaluate"),
        (["pairwise", "output=x", "model=/"], "benchmark.prompts=[]: nothing to ask"),
        (["mt_bench", "output=x", "model=/"], "judge.base_url=null: needs a judge"),
        (["mt_bench", "output=x", "model=nowhere"], "model.restore_from_path=nowhere: no such file"),
        (["reward", "output=x", "model=/", "benchmark.prompts=[a]"], "reward.source=null: nothing to measure by"),
        (["reward", "output=x", "judge.url=1"], "judge.url=1: no such key"),
        (["pairwise", "output=x", "models={sft: a}"], "write +models.sft=<value> to add it"),
        (["alpaca_eval"], "mandatory, but not set"),
        (["pairwise", "output=x", "+models.a/b=/"], "models.a/b"),
        (["mt_bench", "output=x", "model=/", "judge.base_url=http://127.0.0.1:9/v1"], "judge.model=None: set both"),
        (["mt_bench", "output=x", "model=/", "judge.attempts=0"], "judge.attempts=0: out of range"),
    ],
)
def test_bad_input_is_one_line(given: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    from megatron_aligndistil.launch import cli

    assert cli.main(["evaluate", *given]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("aligndistil: error: ")]
    assert words in line
    assert not Path("x").exists()


def test_a_judge_that_cannot_be_reached_is_one_line_before_a_model_is_loaded(setting: Setting) -> None:
    server = JudgeServer(more_vowels, url="http://127.0.0.1:9/v1")
    finished = run("evaluate", *pairwise(setting, server, "unreachable", "judge.attempts=2"))
    assert finished.exit_code == 2 and len(finished.error_lines) == 1
    assert "judge.base_url=http://127.0.0.1:9/v1: no answer" in finished.errors and "layout" not in finished.errors
    assert not (setting.folder / "unreachable").exists()
