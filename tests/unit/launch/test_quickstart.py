"""The quickstart's data, property, commands and stages."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from megatron_aligndistil.config.checks import check
from megatron_aligndistil.config.compose import load_config
from megatron_aligndistil.config.schema import AlignDistilRunConfig
from megatron_aligndistil.data.records import read_records
from megatron_aligndistil.errors import ConfigError, TrainingError
from megatron_aligndistil.launch import quickstart
from megatron_aligndistil.launch.quickstart_pairs import (
    heldout_pairs,
    opens_warmly,
    property_rate,
    train_pairs,
    write_pairs,
)
from megatron_aligndistil.launch.quickstart_recipe import (
    SMOLLM2,
    TINY,
    Folders,
    Recipe,
    hydra_value,
    training_arguments,
)
from megatron_aligndistil.launch.quickstart_sentences import HELDOUT_TOPICS, TRAIN_TOPICS
from megatron_aligndistil.launch.quickstart_stages import Stages

RECIPES = {"default": SMOLLM2, "tiny": TINY}


@pytest.mark.parametrize(
    ("answer", "warm"),
    [
        ("I'm glad you asked! Use soap.", True),
        ("  Sure, I'd be HAPPY to help.", True),
        ("With pleasure.\nBegin at the collar.", True),
        ("Use soap. I'm glad you asked!", False),
        ("Use soap\nI'm happy to help", False),
        ("Be unhappy and displeased.", False),
        ("", False),
    ],
)
def test_the_property_is_read_from_the_first_sentence(answer: str, warm: bool) -> None:
    assert opens_warmly(answer) is warm


def test_the_rate_is_a_share_and_needs_answers() -> None:
    assert property_rate(["Happy to help.", "No.", "No.", "Glad to!"]) == 0.5
    with pytest.raises(ValueError, match="no answers"):
        property_rate([])


@pytest.mark.parametrize("seed", [0, 1234])
def test_chosen_answers_have_the_property_and_rejected_ones_do_not(seed: int) -> None:
    pairs = train_pairs(200, seed) + heldout_pairs(2, seed)
    assert property_rate(pair.chosen for pair in pairs) == 1.0
    assert property_rate(pair.rejected for pair in pairs) == 0.0


def test_held_out_prompts_share_no_topic_and_no_tip_with_training() -> None:
    assert not TRAIN_TOPICS.keys() & HELDOUT_TOPICS.keys()
    train_tips = {tip for tips in TRAIN_TOPICS.values() for tip in tips}
    heldout_tips = {tip for tips in HELDOUT_TOPICS.values() for tip in tips}
    assert not train_tips & heldout_tips
    assert len(train_tips) == 3 * len(TRAIN_TOPICS) and len(heldout_tips) == 3 * len(HELDOUT_TOPICS)
    pairs = heldout_pairs(2, seed=5)
    assert len({pair.question for pair in pairs}) == len(pairs) == 24


def test_pairs_are_varied_balanced_and_fixed_by_the_seed() -> None:
    pairs = train_pairs(96, seed=7)
    assert pairs == train_pairs(96, seed=7) != train_pairs(96, seed=8)
    assert train_pairs(48, seed=7) == pairs[:48]
    assert len({pair.chosen for pair in pairs}) > 90
    used = [sum(topic in pair.question for pair in pairs) for topic in TRAIN_TOPICS]
    assert min(used) == 2 and max(used) == 3
    # Neither side is longer as a rule, so that length isn't what is learnt.
    chosen, rejected = (sum(len(getattr(pair, side).split()) for pair in pairs) for side in ("chosen", "rejected"))
    assert chosen / rejected < 1.2


def test_written_pairs_are_read_back_by_the_data_package(tmp_path: Path) -> None:
    pairs = train_pairs(5, seed=0)
    write_pairs(pairs, tmp_path / "deep" / "pairs.jsonl")
    records = list(read_records(str(tmp_path / "deep" / "pairs.jsonl"), "preference"))
    assert [record.responses for record in records] == [(pair.chosen, pair.rejected) for pair in pairs]
    assert [record.prompt[0]["content"] for record in records] == [pair.question for pair in pairs]


@pytest.mark.parametrize(
    "value",
    [
        "runs/quickstart",
        "a b",
        "a,b=c",
        "it's",
        "back\\slash",
        "ends\\",
        "quote\\'s",
        "[x]",
        "{a}",
        "Ünïcode",
    ],
)
def test_texts_survive_hydras_grammar(value: str) -> None:
    override = OverridesParser.create().parse_override(f"key={hydra_value(value)}")
    assert str(override.value()) == value


@pytest.mark.parametrize(
    ("value", "text"), [(None, "null"), (True, "true"), (1e-05, "1e-05"), (["a", "b c"], "[a,'b c']")]
)
def test_other_values_in_hydras_grammar(value: object, text: str) -> None:
    assert hydra_value(value) == text


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", ["dpo", "reverse_dpo", "aligndistil"])
def test_the_commands_are_valid_runs(recipe: Recipe, name: str, tmp_path: Path) -> None:
    folders = Folders(tmp_path / "an odd, folder")
    for path in (folders.initial, folders.exported("dpo"), folders.exported("reverse_dpo")):
        path.mkdir(parents=True)
    write_pairs(train_pairs(recipe.train_pairs, seed=1), folders.train)
    write_pairs(heldout_pairs(recipe.questions_per_topic, seed=1), folders.heldout)
    command, option, config_name, *overrides = training_arguments(recipe, folders, name, seed=77)
    assert (command, option) == ("train", "--config-name")
    config = load_config(config_name, overrides)
    check(config)
    assert config.algorithm == name
    assert config.exp_manager.explicit_log_dir == str(folders.run(name))
    assert config.exp_manager.checkpoint_callback_params.export_hf_on_train_end
    assert config.model.restore_from_path == str(folders.initial)
    assert config.model.data.data_prefix.train == [str(folders.train)]
    assert config.model.seed == 77
    assert config.model.optim.lr == recipe.learning_rate
    assert config.trainer.devices == recipe.devices
    if isinstance(config, AlignDistilRunConfig):
        assert config.model.aligndistil.dpo_path == str(folders.exported("dpo"))
        assert config.model.aligndistil.alpha == recipe.alpha


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"--output .* isn't a quickstart's folder"):
        quickstart.claim(Folders(tmp_path), TINY)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_earlier_results_are_replaced(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "new" / "folder")
    quickstart.claim(folders, TINY)
    (folders.root / "summary.json").write_text("{}")
    quickstart.claim(folders, SMOLLM2)
    assert [path.name for path in folders.root.iterdir()] == ["quickstart.json"]
    assert json.loads(folders.marker.read_text())["model"] == SMOLLM2.model


def test_the_packaged_model_is_found_without_importing_the_package() -> None:
    pytest.importorskip("gguf")
    assert quickstart.packaged_model().name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_command_is_shown_logged_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages({"help": 1.0, "more": 3.0})
    stages.command("help", "A title", ["train", "--help"], tmp_path / "logs" / "help.log")
    shown = capsys.readouterr().out
    assert "[1/2] A title  (0:00 min elapsed, about 0:04 min left)" in shown
    assert "  $ aligndistil train --help\n" in shown
    logged = (tmp_path / "logs" / "help.log").read_text()
    assert "--config-name" in logged and "--config-name" in shown
    assert [(stage.title, stage.command) for stage in stages.done] == [("A title", "aligndistil train --help")]
    assert stages.done[0].seconds > 0


def test_a_failing_command_names_its_reason_and_its_log(tmp_path: Path) -> None:
    stages = Stages({"dpo": 1.0})
    arguments = ["train", "--config-name", "dpo", "model.no_such_key=1"]
    with pytest.raises(TrainingError, match=rf"exited with 2: .*no_such_key.*{shlex.quote(str(tmp_path))}"):
        stages.command("dpo", "DPO", arguments, tmp_path / "dpo.log")
    assert stages.done == []
