"""``aligndistil evaluate`` as a user runs it: answers, judgments, two ranks, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.analysis_setting import TP2, Setting, rows
from tests.integration.evaluating import arguments, evaluate, more_vowels, pairwise, text_of, vowels
from tests.integration.program import run
from tests.unit.evaluation.judge_server import JudgeServer, serving


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("evaluate"))


def rewarded(setting: Setting, *overrides: str) -> list[str]:
    """Overrides of ``reward``."""
    return [
        f"benchmark.prompts=[{setting.test}]",
        "reward.source=model",
        f"reward.path={setting.models['reward']}",
        *overrides,
    ]


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
    tight = ("model.encoder_seq_length=16",)  # room for few whole prompts
    evaluate(*arguments(setting, "reward", "reward", *shared, *measure, *tight))
    results = json.loads((setting.folder / "reward" / "results.json").read_text())
    assert 0 < results["answers"]["model"]["cut_prompts"] <= 9 and "prompts cut" in text_of(setting, "reward")
    assert {name for name, own in results["models"].items() if own["reward"]["value"] is not None} == {"model", "ready"}
    assert "mean reward" in text_of(setting, "reward") and "win rate over" not in text_of(setting, "reward")


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
    given = (
        f"output={output}",
        f"benchmark.pairs=[{setting.test}]",
        "judge.model=tiny",
        f"cache_dir={output / 'cache'}",
    )
    with serving(lambda body: "[[A]]") as server:
        evaluate("judge-agreement", *given, f"judge.base_url={server.url}")
    assert not server.asked and not (output / "results.json").exists()
    # Its first rank ends here: this one must too, which else would wait for it.
    finished = run("evaluate", "judge-agreement", *given, f"judge.base_url={server.url}", "judge.attempts=1")
    assert finished.exit_code == 2 and "no answer" in finished.errors


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
        (["reward", "output=x", "model.data.long_prompt=drop"], "model.data.long_prompt=drop: no such key"),
        (["mt_bench", "output=x", "model=/", "judge.attempts=0"], "judge.attempts=0: out of range"),
    ],
)
def test_bad_input_is_one_line(given: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    from megatron_aligndistil.launch import cli

    assert cli.main(["evaluate", *given]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("aligndistil: error: ")]
    assert words in line
    assert not Path("x").exists()


def test_a_broken_second_model_is_one_line_before_the_first_answers(setting: Setting) -> None:
    broken = setting.folder / "broken"
    shutil.copytree(setting.models["model"], broken, ignore=shutil.ignore_patterns("*.safetensors"))
    given = rewarded(setting, f"+models.a={setting.models['model']}", f"+models.b={broken}")
    finished = run("evaluate", *arguments(setting, "reward", "second", *given))
    assert finished.exit_code == 2 and len(finished.error_lines) == 1
    assert f"{broken}: neither model.safetensors" in finished.errors and "layout" not in finished.errors


def test_an_engine_that_cannot_start_is_told_by_its_own_key(setting: Setting) -> None:
    engine = ("sampling.engine=vllm", "sampling.vllm.python=/nowhere")
    given = rewarded(setting, f"model={setting.models['model']}", *engine)
    finished = run("evaluate", *arguments(setting, "reward", "engine", *given))
    assert finished.exit_code == 2 and "error: sampling.vllm.python=/nowhere: " in finished.error_lines[0]


def test_an_output_that_cannot_be_written_is_one_line(setting: Setting) -> None:
    (setting.folder / "taken" / "answers.jsonl").mkdir(parents=True)
    given = rewarded(setting, f"model={setting.models['model']}")
    finished = run("evaluate", *arguments(setting, "reward", "taken", *given))
    assert finished.exit_code == 2 and len(finished.error_lines) == 1
    assert "answers.jsonl (Is a directory); make room there" in finished.errors


def test_a_judge_that_cannot_be_reached_is_one_line_before_a_model_is_loaded(setting: Setting) -> None:
    server = JudgeServer(more_vowels, url="http://127.0.0.1:9/v1")
    finished = run("evaluate", *pairwise(setting, server, "unreachable", "judge.attempts=2"))
    assert finished.exit_code == 2 and len(finished.error_lines) == 1
    assert "judge.base_url=http://127.0.0.1:9/v1: no answer" in finished.errors and "layout" not in finished.errors
    assert not (setting.folder / "unreachable").exists()
