"""Evaluation while a run trains: training cannot tell, a resumed run goes on with it, a failing judge costs no run."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.integration.program import Finished, losses, records, run, run_and_kill, write_model, write_pairs
from tests.unit.evaluation.judge_server import Body, Response, serving

STEPS, PROMPTS = 6, 5
REWARDS = """
def vowels(prompts, responses):
    assert all(prompt.startswith("user: ") for prompt in prompts)
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]

def nothing(prompts, responses):
    return [float("nan")] * len(responses)
"""


def vowels(text: str) -> float:
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


class Setting:
    """Models, pairs, prompts, a reward function."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = {name: write_model(folder / name, seed) for seed, name in enumerate(("model", "dpo", "reverse"))}
        self.pairs = write_pairs(folder / "pairs.jsonl", 40)
        self.prompts = write_pairs(folder / "prompts.jsonl", PROMPTS, seed=7)
        (folder / "evaluation_rewards.py").write_text(REWARDS)

    def arguments(self, recipe: str, log_dir: Path, *overrides: str) -> tuple[str, ...]:
        return (
            *("train", "--config-name", recipe),
            f"model.restore_from_path={self.models['model']}",
            f"model.data.data_prefix.train=[{self.pairs}]",
            f"model.data.cache_dir={self.folder / 'cache'}",
            f"exp_manager.explicit_log_dir={log_dir}",
            "exp_manager.resume_if_exists=true",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
            "model.encoder_seq_length=192",
            "model.data.max_prompt_length=96",
            "model.global_batch_size=4",
            "model.micro_batch_size=2",
            "model.optim.lr=1e-2",
            f"trainer.max_steps={STEPS}",
            "trainer.max_epochs=100",
            "trainer.precision=32",
            *overrides,
        )

    def evaluation(self, *overrides: str) -> tuple[str, ...]:
        return (
            "evaluation.every_n_steps=2",
            f"evaluation.prompts=[{self.prompts}]",
            "evaluation.sampling.max_new_tokens=8",
            *overrides,
        )


FUNCTION = ("evaluation.reward.source=function", "evaluation.reward.function=evaluation_rewards:vowels")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("training-evaluation"))


@pytest.fixture(autouse=True)
def in_the_users_folder(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(setting.folder)


def of_judge(url: str) -> tuple[str, ...]:
    return f"evaluation.judge.base_url={url}", "evaluation.judge.model=tiny"


def longer_wins(body: Body) -> str:
    prompt = body["messages"][-1]["content"]
    first, second = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nEnd with", prompt, re.DOTALL).groups()
    return "[[C]]" if len(first) == len(second) else "[[A]]" if len(first) > len(second) else "[[B]]"


def well(finished: Finished) -> Finished:
    assert finished.exit_code == 0, finished.errors
    return finished


def evaluations(log_dir: Path) -> list[dict[str, Any]]:
    """The figures without what a clock or the judge's cache say."""
    changing = ("evaluation_seconds", "judge_cached", "judge_prompt_tokens", "judge_completion_tokens")
    return [{k: v for k, v in own.items() if k not in changing} for own in records(log_dir, "evaluation")]


def answers(log_dir: Path, step: int) -> list[dict[str, Any]]:
    text = (log_dir / "evaluation" / f"step_{step:08d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def trained(log_dir: Path) -> list[dict[str, Any]]:
    """What training says of itself, without its clocks."""
    return [
        {k: v for k, v in own.items() if not k.endswith(("_seconds", "_per_second", "memory_gib"))}
        for own in records(log_dir)
    ]


LAYOUTS = {
    "tp2-lora": ("model.tensor_model_parallel_size=2", "model.peft.peft_scheme=lora"),
    "dp2": (),
}


@pytest.mark.parametrize("layout", ["tp2-lora", pytest.param("dp2", marks=pytest.mark.slow)])
def test_training_cannot_tell(setting: Setting, tmp_path: Path, layout: str) -> None:
    further = ("trainer.devices=2", *LAYOUTS[layout])
    well(run(*setting.arguments("dpo", tmp_path / "plain", *further)))
    log_dir = tmp_path / "evaluated"
    with serving(longer_wins) as judge:
        asked = setting.evaluation(*FUNCTION, *of_judge(judge.url))
        well(run(*setting.arguments("dpo", log_dir, *further, *asked)))
    assert trained(log_dir) == trained(tmp_path / "plain")
    found = records(log_dir, "evaluation")
    assert [own["step"] for own in found] == [0, 2, 4, 6]
    assert "win_rate" not in found[0]
    before = [row["answer"] for row in answers(log_dir, 0)]
    changed = 0
    for own in found:
        rows = answers(log_dir, own["step"])
        rewards = [vowels(row["answer"]) for row in rows]
        assert [row["reward"] for row in rows] == pytest.approx(rewards, abs=0.05)  # answers are kept stripped
        assert own["reward_mean"] == pytest.approx(sum(row["reward"] for row in rows) / PROMPTS, rel=1e-12)
        assert own["response_tokens_mean"] == sum(row["tokens"] for row in rows) / PROMPTS
        if own["step"]:
            lengths = [(len(row["answer"]), len(first)) for row, first in zip(rows, before, strict=True)]
            won = [(mine > theirs) + 0.5 * (mine == theirs) for mine, theirs in lengths]
            assert [row["won"] for row in rows] == won
            assert own["win_rate"] == sum(won) / PROMPTS
            assert own["judge_failures"] == own["judge_unreadable"] == 0
            changed += [row["answer"] for row in rows] != before
    assert changed, "the answers are those of the trained weights"
    assert len(judge.asked) == len({json.dumps(body) for body in judge.asked}), "nothing is asked twice"


def test_a_killed_run_goes_on_with_the_same_evaluations(setting: Setting, tmp_path: Path) -> None:
    with serving(longer_wins) as judge:
        asked = setting.evaluation(*FUNCTION, *of_judge(judge.url), "evaluation.sampling.temperature=1.0")
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        well(run(*setting.arguments("dpo", whole, *asked)))
        run_and_kill(broken, 3, 0.0, *setting.arguments("dpo", broken, *asked))
        assert "resumed from" in well(run(*setting.arguments("dpo", broken, *asked))).errors
    assert losses(broken) == losses(whole)
    assert evaluations(broken) == evaluations(whole)
    assert all(answers(broken, step) == answers(whole, step) for step in (0, 2, 4, 6))


def test_on_policy_training_lends_its_engine_and_cannot_tell(setting: Setting, tmp_path: Path) -> None:
    own = (
        "model.rollout.max_new_tokens=12",
        "model.rollout.prompts_per_rollout=12",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=100",
        f"model.aligndistil.dpo_path={setting.models['dpo']}",
        f"model.aligndistil.reverse_dpo_path={setting.models['reverse']}",
    )
    reward = (
        "evaluation.reward.source=contrastive",
        f"evaluation.reward.dpo_path={setting.models['dpo']}",
        f"evaluation.reward.reverse_dpo_path={setting.models['reverse']}",
    )
    recipe = "aligndistil_on_policy"
    well(run(*setting.arguments(recipe, tmp_path / "plain", *own)))
    finished = well(run(*setting.arguments(recipe, tmp_path / "evaluated", *own, *setting.evaluation(*reward))))
    assert trained(tmp_path / "evaluated") == trained(tmp_path / "plain")
    found = records(tmp_path / "evaluated", "evaluation")
    assert [one["step"] for one in found] == [0, 2, 4, 6]
    assert len({one["reward_mean"] for one in found}) > 1
    assert finished.errors.count("weights to the engines: ") == 2 + 4, "one sync a rollout, one an evaluation"


def test_a_judge_that_fails_costs_its_figures_alone(setting: Setting, tmp_path: Path) -> None:
    lock, said = threading.Lock(), list[str]()

    def tires(body: Body) -> Response | str:
        with lock:
            said.append("")
            if len(said) > 2 * PROMPTS:
                return Response("down", status=500)
        return "no verdict" if len(said) == 1 else "[[A]]"

    with serving(tires) as judge:
        asked = setting.evaluation(
            *of_judge(judge.url), "evaluation.judge.attempts=1", "evaluation.judge.concurrency=1"
        )
        finished = well(run(*setting.arguments("dpo", tmp_path, *asked)))
    found = records(tmp_path, "evaluation")
    assert len(losses(tmp_path)) == STEPS
    assert [own.get("judge_failures") for own in found] == [None, 0, 1, 1]
    assert [own.get("judge_unreadable") for own in found] == [None, 1, None, None]
    assert [own["step"] for own in found if "win_rate" in own] == [2]
    assert "no win rate in this evaluation: evaluation.judge.base_url=" in finished.errors


BAD = [
    (("evaluation.judge.base_url=http://127.0.0.1:9/v1", "evaluation.judge.model=m"), "evaluation.judge.base_url="),
    (("evaluation.reward.source=function", "evaluation.reward.function=nowhere:f"), "evaluation.reward.function="),
    (
        ("evaluation.reward.source=function", "evaluation.reward.function=evaluation_rewards:nothing"),
        "evaluation.reward.function=evaluation_rewards:nothing",
    ),
]


@pytest.mark.parametrize(("overrides", "said"), BAD)
def test_bad_input_is_one_line_before_training(
    setting: Setting, tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    more = ("evaluation.judge.attempts=1",) if "judge" in overrides[0] else ()
    finished = run(*setting.arguments("dpo", tmp_path, *setting.evaluation(*overrides, *more)))
    assert finished.exit_code == 2, finished.errors
    (line,) = finished.error_lines
    assert line.startswith(f"aligndistil: error: {said}")
    assert not losses(tmp_path)


def test_a_judge_needs_the_answers_of_the_runs_start(setting: Setting, tmp_path: Path) -> None:
    well(run(*setting.arguments("dpo", tmp_path, "trainer.max_steps=2")))
    with serving(longer_wins) as judge:
        finished = run(*setting.arguments("dpo", tmp_path, *setting.evaluation(*of_judge(judge.url))))
    assert finished.exit_code == 2
    (line,) = finished.error_lines
    assert "step_00000000.jsonl: no answers from before training" in line
