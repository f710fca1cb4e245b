"""Rules on a run's evaluation: each names the key, the value and a remedy."""

from __future__ import annotations

import pytest

from megatron_aligndistil.config import checks, training_evaluation_rules
from megatron_aligndistil.config.compose import load_config
from megatron_aligndistil.config.training_evaluation_schema import TrainingEvaluationConfig
from megatron_aligndistil.errors import ConfigError
from tests.unit.config.test_checks import paths, run
from tests.unit.config.test_checks import test_every_rule_is_run as check_registered

__all__ = ["paths"]  # a fixture

JUDGE = "evaluation.judge.base_url=http://h:1/v1 evaluation.judge.model=m"
REWARD = "evaluation.reward.source=function evaluation.reward.function=a:b"
# (recipe, what is added to a good evaluation by a reward, what the line begins with, what it must also say)
REFUSED = [
    ("dpo", "evaluation.every_n_steps=-1", "evaluation.every_n_steps=-1: ", "0 or more"),
    ("dpo", "evaluation.every_n_steps=null", "evaluation.every_n_steps=null: ", "set it"),
    ("dpo", "evaluation.limit=0", "evaluation.limit=0: ", "-1"),
    ("dpo", "evaluation.prompts=[]", "evaluation.prompts=[]: ", "name files"),
    ("dpo", "evaluation.prompts=[no.jsonl]", "evaluation.prompts: no.jsonl: ", "no such file"),
    ("dpo", "evaluation.sampling.engine=sglang", "evaluation.sampling.engine=sglang: ", "hf, vllm"),
    ("dpo", "evaluation.sampling.top_p=0", "evaluation.sampling.top_p=0.0: ", "(0, 1]"),
    ("dpo", "evaluation.sampling.temperature=-1", "evaluation.sampling.temperature=-1.0: ", "0 or more"),
    (
        "dpo",
        "evaluation.sampling.max_new_tokens=1025",
        "evaluation.sampling.max_new_tokens=1025: ",
        "encoder_seq_length=2048",
    ),
    (
        "dpo",
        "evaluation.sampling.vllm.base_url=http://h",
        "evaluation.sampling.vllm.base_url=http://h: ",
        "engine=vllm",
    ),
    ("ppo", "evaluation.sampling.engine=vllm", "evaluation.sampling.engine: ", "model.rollout"),
    ("reward_model", "evaluation.limit=3", "evaluation.every_n_steps=5: ", "gives no answers"),
    ("dpo", "evaluation.reward.source=magic", "evaluation.reward.source=magic: ", "null, model"),
    ("dpo", "evaluation.reward.source=model", "evaluation.reward.source=model: ", "evaluation.reward.path"),
    ("dpo", "evaluation.reward.path=nowhere", "evaluation.reward.path=nowhere: ", "no such file"),
    (
        "dpo",
        "evaluation.reward.source=null evaluation.reward.function=null",
        "evaluation.reward.source=null: ",
        "judge.base_url",
    ),
    ("dpo", "evaluation.judge.model=m", "evaluation.judge.base_url=None, evaluation.judge.model=m: ", "set both"),
    ("dpo", "evaluation.judge.concurrency=2", "evaluation.judge.base_url=null: ", "set it"),
    ("dpo", "evaluation.judge.attempts=0", "evaluation.judge.attempts=0: ", "at least 1"),
    (
        "dpo",
        "evaluation.judge.api_key_variable=NO_SUCH_KEY",
        "evaluation.judge.api_key_variable=NO_SUCH_KEY: ",
        "export",
    ),
    ("dpo", "evaluation.cache_dir=x", "evaluation.cache_dir=x: ", "judge"),
    ("dpo", f"{JUDGE} evaluation.before_training=false", "evaluation.before_training=false: ", "remove it"),
    ("dpo", f"{JUDGE} evaluation.judge_prompt=no.txt", "evaluation.judge_prompt=no.txt: ", "no such file"),
]


def evaluated(paths, recipe: str, overrides: str):
    good = ["evaluation.every_n_steps=5", f"evaluation.prompts=[{paths}/pairs.jsonl]", *REWARD.split()]
    return run(paths, recipe, *good, *overrides.split())


@pytest.mark.parametrize(("recipe", "overrides", "begins", "says"), REFUSED)
def test_refused(paths, recipe, overrides, begins, says):
    with pytest.raises(ConfigError) as refusal:
        checks.check(evaluated(paths, recipe, overrides))
    line = str(refusal.value)
    assert line.startswith(begins) and says in line and "\n" not in line


GOOD = [
    ("dpo", ""),
    ("dpo", JUDGE),
    ("ppo", JUDGE),
    ("sft", f"{JUDGE} evaluation.reward.source=null evaluation.reward.function=null"),
    ("aligndistil", "evaluation.sampling.engine=vllm"),
    ("reward_model", "evaluation.every_n_steps=0"),
]


@pytest.mark.parametrize(("recipe", "overrides"), GOOD)
def test_accepted(paths, recipe, overrides):
    checks.check(evaluated(paths, recipe, overrides))


def test_no_run_is_evaluated_unasked():
    assert load_config("dpo", ["model.restore_from_path=x"]).evaluation == TrainingEvaluationConfig()
    assert not TrainingEvaluationConfig().every_n_steps


def test_each_rule_is_registered():
    check_registered(training_evaluation_rules, set(training_evaluation_rules.EVALUATION_RULES))
