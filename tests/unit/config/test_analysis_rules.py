"""What an analysis's keys may be, and the run that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.config.analysis_rules import as_run, check
from megatron_aligndistil.config.analysis_schema import ANALYSES, AnalysisConfig
from megatron_aligndistil.config.compose import load_overrides
from megatron_aligndistil.errors import ConfigError

GOOD = {
    "reward_accuracy": ["models.reward_model={here}", "analysis.test=[{here}]"],
    "extrapolation": ["analysis.prompts=[{here}]", "analysis.reward.source=model", "analysis.reward.path={here}"],
    "tokens": ["models.dpo={here}", "models.reverse_dpo={here}", "analysis.data=[{here}]"],
}


def config(name: str, here: Path, *overrides: str) -> Any:
    given = [text.format(here=here) for text in (*GOOD[name], *overrides)]
    return load_overrides(ANALYSES[name], [f"output={here / 'out'}", *given], name)


@pytest.mark.parametrize("name", ANALYSES)
def test_a_good_configuration_is_taken(name: str, tmp_path: Path) -> None:
    check(config(name, tmp_path))


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("reward_accuracy", "analysis.test=[]", r"analysis\.test=\[\]: no pairs"),
        ("reward_accuracy", "models.reward_model=null", "no reward can be made"),
        ("reward_accuracy", "analysis.limit=0", r"analysis\.limit=0: out of range; must be -1 \(all\) or at least 1"),
        ("reward_accuracy", "analysis.beta0=0", r"analysis\.beta0=0\.0: out of range"),
        ("reward_accuracy", "analysis.bootstrap_samples=0", r"analysis\.bootstrap_samples=0: out of range"),
        ("reward_accuracy", "models.dpo=/nowhere", r"models\.dpo=/nowhere: no such file"),
        ("reward_accuracy", "output=/dev/null/x", r"output=/dev/null/x: no folder can be made there"),
        ("extrapolation", "analysis.reward.path=null", r"needs analysis\.reward\.path"),
        ("extrapolation", "analysis.reward.function=m:f", r"function=m:f: unused by analysis\.reward\.source=model"),
        ("extrapolation", "analysis.sampling.temperature=-1", r"analysis\.sampling\.temperature=-1\.0: out of range"),
        ("extrapolation", "analysis.sampling.top_p=0", r"top_p=0\.0: out of range; must be in \(0, 1\]"),
        ("extrapolation", "analysis.sampling.engine=tgi", "choose one of hf, vllm"),
        ("extrapolation", "analysis.sampling.max_new_tokens=1500", r"above model\.encoder_seq_length=2048"),
        ("extrapolation", "analysis.constants=[1.5,1.5]", "one is named twice"),
        ("extrapolation", "analysis.constants=[-1.0]", r"analysis\.constants: -1\.0: out of range"),
        ("extrapolation", "analysis.reward={{source: null, path: null}}", "no reward to compare by"),
        ("tokens", "analysis.colour=kl_to_dpo", r"needs models\.policy"),
        ("tokens", "analysis.colour=red", "choose one of alpha, tvd"),
        ("tokens", "analysis.data=[/nowhere.jsonl]", r"analysis\.data: /nowhere\.jsonl: no such file"),
    ],
)
def test_a_bad_value_is_told_with_its_key(name: str, override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        check(config(name, tmp_path, override))


def test_the_run_has_the_layout_and_whole_rounds_of_micro_batches(tmp_path: Path) -> None:
    own: AnalysisConfig = config(
        "tokens",
        tmp_path,
        "trainer.devices=8",
        "model.tensor_model_parallel_size=2",
        "model.pipeline_model_parallel_size=2",
        "model.micro_batch_size=3",
        "model.data.batching=bucketed",
    )
    run = as_run(own, "m")
    assert (run.model.restore_from_path, run.model.global_batch_size) == ("m", 2 * 3 * 2)
    assert run.trainer.devices == 8 and run.model.tensor_model_parallel_size == 2
    assert run.model.kernel is own.model.kernel
    assert run.exp_manager.explicit_log_dir == own.output, "where ranks of several nodes leave their reports"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.devices=3", "not a multiple"),
        ("trainer.precision=16", r"trainer\.precision=16"),
        ("model.data.batching=packed", "micro_batch_size=8"),
        ("model.sequence_parallel=true", "needs model.tensor_model_parallel_size"),
        ("model.data.max_prompt_length=2048", "leaves no room for a response"),
        ("model.seed=2147483648", r"model\.seed=2147483648: out of range; must be at most 2147483647"),
        ("trainer.timeout_minutes=1e300", r"trainer\.timeout_minutes=1e\+300: out of range; must be at most 525600"),
    ],
)
def test_what_no_run_takes_no_analysis_takes(override: str, words: str, tmp_path: Path) -> None:
    layout = "model.tensor_model_parallel_size=" + ("2" if "devices" in override else "1")
    with pytest.raises(ConfigError, match=words):
        own = config("reward_accuracy", tmp_path, layout, override)
        as_run(own, "m")


def test_an_own_yaml_comes_between_the_defaults_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [tokens, _self_]\nmodels: {dpo: x}\nanalysis: {colour: tvd, limit: 7}\n"
    )
    given = ["output=o", "analysis.limit=9", "models.reverse_dpo=y"]
    own: Any = load_overrides(ANALYSES["tokens"], given, "tokens", ("mine", tmp_path))
    assert (own.models.dpo, own.models.reverse_dpo) == ("x", "y")
    assert (own.analysis.colour, own.analysis.limit, own.analysis.alpha) == ("tvd", 9, 20.0)
    with pytest.raises(ConfigError, match=r"holds no other\.yaml"):
        load_overrides(ANALYSES["tokens"], [], "tokens", ("other", tmp_path))
