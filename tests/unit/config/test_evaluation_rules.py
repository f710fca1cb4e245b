"""An evaluation's keys: what is taken, and the line that says what isn't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.config.compose import load_overrides
from megatron_aligndistil.config.evaluation_rules import check, models_of, name_of
from megatron_aligndistil.config.evaluation_schema import EVALUATIONS
from megatron_aligndistil.errors import ConfigError

JUDGE = ["judge.base_url=http://h/v1", "judge.model=m"]
MODEL = ["+models.own={here}"]
GOOD = {
    "alpaca_eval": [*MODEL, *JUDGE],
    "mt_bench": [*MODEL, *JUDGE, "benchmark.folder={here}"],
    "arena_hard": [*MODEL, *JUDGE, "benchmark.folder={here}"],
    "tldr": [*MODEL, "+outputs.sft={here}", *JUDGE, "benchmark.prompts=[{here}]"],
    "pairwise": [
        *MODEL,
        "+models.sft={here}",
        "benchmark.prompts=[{here}]",
        "reward.source=function",
        "reward.function=m:f",
    ],
    "reward": [*MODEL, "benchmark.prompts=[{here}]", "reward.source=model", "reward.path={here}"],
    "judge-agreement": [*JUDGE, "benchmark.pairs=[{here}]"],
}


def config(name: str, here: Path, *overrides: str) -> Any:
    given = [text.format(here=here) for text in (*GOOD[name], *overrides)]
    return load_overrides(EVALUATIONS[name], [f"output={here / 'out'}", *given], name)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_good_configuration_is_taken(name: str, tmp_path: Path) -> None:
    check(config(name, tmp_path))


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("mt_bench", "judge.base_url=null", r"judge\.base_url=None, judge\.model=m: set both, or neither"),
        ("mt_bench", "judge.api_key_variable=NO_SUCH_KEY", "no such environment variable"),
        ("mt_bench", "judge.timeout_seconds=0", r"judge\.timeout_seconds=0\.0: out of range"),
        ("mt_bench", "judge.concurrency=0", r"judge\.concurrency=0: out of range; must be at least 1"),
        ("mt_bench", "benchmark.folder=/nowhere", r"benchmark\.folder=/nowhere: no such file"),
        ("mt_bench", "sampling.temperature=-1", r"sampling\.temperature=-1\.0: out of range"),
        ("mt_bench", "sampling.top_p=0", r"sampling\.top_p=0\.0: out of range; must be in \(0, 1\]"),
        ("mt_bench", "sampling.engine=tgi", "choose one of hf, vllm"),
        ("mt_bench", "sampling.max_new_tokens=0", r"sampling\.max_new_tokens=0: out of range"),
        ("mt_bench", "+models={{a/b: {here}}}", r"models\.a/b: a name has letters"),
        ("mt_bench", f"+models.{'a' * 101}={{here}}", r"a: a name has letters.* 100 at most"),
        ("mt_bench", "model.restore_from_path=", r"model\.restore_from_path=: no such file"),
        ("mt_bench", "model.encoder_seq_length=1", r"model\.encoder_seq_length=1: out of range; must be at least 2"),
        ("mt_bench", "bootstrap_samples=1000001", r"at least 1 and at most 1000000"),
        ("mt_bench", "+judge.extra_body.temperature=1", r"judge\.extra_body\.temperature=1: .* by the evaluation"),
        ("mt_bench", "+judge.extra_body.model=b", r"judge\.extra_body\.model=b: .* its own by judge\.model; remove"),
        ("mt_bench", "+judge.extra_body.stream=true", r"extra_body\.stream=True: .* reads one reply"),
        ("mt_bench", "+outputs.own={here}", r"outputs\.own: a model has this name too"),
        ("mt_bench", "output=/dev/null/x", r"output=/dev/null/x: no folder can be made there"),
        ("arena_hard", "benchmark.strong_weight=0", r"benchmark\.strong_weight=0: out of range"),
        ("arena_hard", "benchmark.judge_prompt=/nowhere", r"benchmark\.judge_prompt=/nowhere: no such file"),
        ("pairwise", "benchmark.baseline=base", r"benchmark\.baseline=base: not one of the models own, sft"),
        ("pairwise", "benchmark.prompts=[/nowhere.jsonl]", r"benchmark\.prompts: /nowhere\.jsonl: no such file"),
        ("pairwise", "benchmark.limit=0", r"benchmark\.limit=0: out of range; must be -1 \(all\) or at least 1"),
        ("pairwise", "reward.function=null", r"needs reward\.function"),
        ("pairwise", "reward.path={here}", r"reward\.path=.*: unused by reward\.source=function"),
        ("pairwise", "reward={{source: null, function: null}}", r"nothing to measure by; set it, or judge\.base_url"),
        ("reward", "reward.source=none", "choose one of null, model, contrastive"),
        ("mt_bench", "sampling.vllm.base_url=http://h", r"add sampling\.engine=vllm"),
        ("alpaca_eval", "bootstrap_samples=100", r"bootstrap_samples=100: the library has standard errors"),
        ("pairwise", "judge.concurrency=2", r"judge\.base_url=null: the judge's other keys have no effect"),
        ("pairwise", "benchmark.judge_prompt={here}", r"has no effect without judge\.base_url"),
        ("judge-agreement", "sampling.temperature=1", "sampling: has no effect"),
        ("judge-agreement", "+models.own={here}", "a judge is compared with people's labels"),
        ("judge-agreement", "benchmark.pairs=[]", r"benchmark\.pairs=\[\]: nothing to ask"),
    ],
)
def test_a_bad_value_is_told_with_its_key(name: str, override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check(config(name, tmp_path, override))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_reward_takes_no_judge(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge\.base_url=http://h/v1: only a reward is measured"):
        check(config("reward", tmp_path, *JUDGE))


def test_a_vanilla_reward_names_its_reference(tmp_path: Path) -> None:
    given = ("reward.source=vanilla", "reward.path=null", "reward.dpo_path={here}")
    with pytest.raises(ConfigError, match=r"needs reward\.initial_path"):
        check(config("reward", tmp_path, *given))
    check(config("reward", tmp_path, *given, "reward.initial_path={here}"))


def test_models_are_named_by_their_folders(tmp_path: Path) -> None:
    assert name_of(str(tmp_path / "run one" / "checkpoints" / "step_20")) == "run_one"
    assert name_of(str(tmp_path / "aligned" / "huggingface")) == "aligned"
    given = config("mt_bench", tmp_path, f"model.restore_from_path={tmp_path}")
    assert list(models_of(given)) == [tmp_path.name, "own"]
    with pytest.raises(ConfigError, match=rf"models\.{tmp_path.name}: model=.* has this name too"):
        check(
            config("mt_bench", tmp_path, f"model.restore_from_path={tmp_path}", f"+models.{tmp_path.name}={tmp_path}")
        )


def test_the_benchmarks_answers_have_their_room(tmp_path: Path) -> None:
    """Beside a prompt of some length, and in MT-Bench a first turn."""
    rooms = {name: config(name, tmp_path).model.encoder_seq_length for name in EVALUATIONS}
    assert rooms["alpaca_eval"] == 2048 + 2048 and rooms["mt_bench"] == 2 * 1024 + 2048
    assert rooms["arena_hard"] == 4096 + 4096 and rooms["tldr"] == 2048


def test_the_short_form_is_the_command_lines_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("defaults: [mt_bench, _self_]\nmodel: runs/aligned\n")
    with pytest.raises(ConfigError, match=r"own\.yaml: runs/aligned: a single value where a section belongs; write"):
        load_overrides(EVALUATIONS["mt_bench"], ["output=o"], "mt_bench", ("own", tmp_path))
