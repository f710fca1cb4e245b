"""A NeMo-Aligner configuration → a YAML file of ours, and an account of what became of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from megatron_aligndistil.config import compose
from megatron_aligndistil.config.layout_rules import LAYOUT_RULES
from megatron_aligndistil.config.nemo_conversions import Agreed, Keys, Refused, inherits
from megatron_aligndistil.config.nemo_file import MISSING, ON_POLICY, NemoFile, recognise
from megatron_aligndistil.config.nemo_keys import TABLE
from megatron_aligndistil.config.nemo_rows import SECTION, Row
from megatron_aligndistil.config.peft_rules import PEFT_RULES
from megatron_aligndistil.config.rollout_rules import ROLLOUT_RULES
from megatron_aligndistil.config.rules import CHOICE_AND_RANGE_RULES, RULES
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.config.training_evaluation_rules import EVALUATION_RULES
from megatron_aligndistil.errors import ConfigError

UNKNOWN = "unknown"
# What NeMo takes where a file leaves the key out, and ours would not.
NEMO_DEFAULTS = {
    "exp_manager.resume_ignore_no_checkpoint": False,
    "exp_manager.checkpoint_callback_params.save_top_k": 3,
    "model.optim.betas": [0.9, 0.999],
    "model.optim.sched.name": "WarmupPolicy",
}
_OF_THE_MODEL = (
    "model.encoder_seq_length",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.sequence_parallel",
)
# By the section of trainer: what the programs read, and what is read here.
ROWS = {
    "sft": "rows with input and output, or conversations, become prompt and completion, or messages",
    "rm": "rows of text, chosen and rejected by turns, become rows of prompt, chosen and rejected",
    "dpo": "rows of prompt, chosen_response and rejected_response become prompt, chosen and rejected",
    "kto": "rows of prompt, response and preference become prompt, completion and label (true or false)",
    "ppo": "rows of text become rows of prompt, without the template's tokens",
}
_FREE_FORM = "exp_manager.wandb_logger_kwargs."
_ROWS = [row for rows in TABLE.values() for row in rows]
_EXACT = {name: row for row in _ROWS for name in row.nemo if not name.endswith("*")}
_BELOW = {name.removesuffix("*"): row for row in _ROWS for name in row.nemo if name.endswith("*")}


@dataclass
class Translation:
    """``settings`` differ from the recipe; the lists say what became of NeMo-Aligner's keys (``key=value``).

    agreed     needs no key here, with the reason
    no_equal   means something that cannot be said here, with the reason; or unknown
    left_out   of NeMo's own, with the reason
    assumed    our keys whose values NeMo takes from the model's file, and we from the recipe
    unset      our keys that the file gives no value for, and no run starts without
    refused    the lines with which our checks would refuse the settings
    """

    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    agreed: list[tuple[str, str]] = field(default_factory=list)
    no_equal: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    rows: str = ""
    assumed: list[str] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def yaml(self) -> str:
        """The file: ``defaults`` and the settings, with the account as comments above."""
        nested: dict[str, Any] = {"defaults": [self.recipe, "_self_"]}
        for key, value in self.settings.items():
            *path, name = key.split(".")
            node = nested
            for step in path:
                node = node.setdefault(step, {})
            node[name] = value
        comments = "".join(f"# {line}".rstrip() + "\n" for line in self.account())
        return comments + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=110)

    def account(self) -> Iterator[str]:
        """What became of the file, a line each; keys with one reason share a line."""
        yield (
            f"recipe {self.recipe}: {len(self.taken)} keys taken, {len(self.agreed)} need none here, "
            f"{len(self.no_equal)} without an equal, {len(self.left_out)} of NeMo's own left out"
        )
        for title, items in (("no equal", self.no_equal), ("left out", self.left_out), ("none needed", self.agreed)):
            by_reason: dict[str, list[str]] = {}
            for item, reason in items:
                by_reason.setdefault(reason, []).append(item)
            for reason, names in by_reason.items():
                yield f"{title}: {', '.join(names)}: {reason}"
        if self.rows:
            yield f"data: {self.rows}"
        if self.assumed:
            yield f"NeMo takes from the model's file, and here is as follows unless set: {', '.join(self.assumed)}"
        for key in self.unset:
            yield f"still to be set: {key}"
        for line in self.refused:
            yield f"refused until corrected: {line}"


def translate(path: Path, algorithm: str | None = None) -> Translation:
    """What the NeMo-Aligner file ``path`` is here. ``algorithm`` is a recipe, where the file doesn't say.

    Raises:
        ConfigError: no such file, not YAML, or of a program without a counterpart.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a NeMo-Aligner configuration")
    values, unresolved = compose.read_foreign(path)
    file = recognise(values, str(path), algorithm)
    made = Translation(file.algorithm)
    recipe = _settings_of(file.algorithm)
    _apply(file, made, recipe)
    for key, why in unresolved.items():
        row = _row(key, file.section)
        if row is not None and row.convert is None:
            made.left_out.append((key, row.note))
        else:
            made.no_equal.append((key, f"cannot be resolved ({why})"))
    _lengths(file, made, recipe)
    made.assumed = [f"{key}={_text(recipe[key])}" for key in _OF_THE_MODEL if key not in made.settings]
    made.settings = {key: value for key, value in made.settings.items() if recipe.get(key, MISSING) != value}
    stand_ins: dict[str, Any] = {key: ["name"] if key.startswith("model.data.") else "." for key in _needed(file, made)}
    made.refused = _complaints(_typed(made, stand_ins))
    made.unset = [key for key in stand_ins if key not in made.settings]
    made.rows = ROWS.get(file.section, "")
    return made


def _needed(file: NemoFile, made: Translation) -> list[str]:
    needed = [*_mandatory(file.algorithm), "model.data.data_prefix.train"]
    if made.settings.get("trainer.val_check_interval"):
        needed.append("model.data.data_prefix.validation")
    return [*needed, "model.reward.path"] if file.algorithm == "ppo" else needed


def _with_nemo_defaults(file: NemoFile) -> NemoFile:
    if inherits(file.get("defaults")):
        return file  # it may be there that the key is
    absent = dict(NEMO_DEFAULTS)
    if not (file.has("model.optim.sched.warmup_steps") or file.has("model.optim.sched.warmup_ratio")):
        absent["model.optim.sched.warmup_steps"] = 0
    if file.algorithm == "ipo":
        absent["model.dpo.preference_average_log_probs"] = False
    return NemoFile({**absent, **file.values}, file.section, file.algorithm)


def _row(key: str, section: str) -> Row | None:
    general = f"{SECTION}{key.removeprefix(f'trainer.{section}')}" if key.startswith(f"trainer.{section}.") else key
    for name in (key, general):
        if name in _EXACT:
            return _EXACT[name]
        above = [prefix for prefix in _BELOW if f"{name}.".startswith(prefix)]
        if above:
            return _BELOW[max(above, key=len)]
    return None


def _apply(given: NemoFile, made: Translation, recipe: Mapping[str, Any]) -> None:
    file = _with_nemo_defaults(given)
    rows = {key: _row(key, file.section) for key in file.values}
    order = {id(row): place for place, row in enumerate(_ROWS)}
    for key, row in sorted(rows.items(), key=lambda item: order.get(id(item[1]), -1)):
        value = file.values[key]
        shown = f"{key}={_text(value)}" + ("" if given.has(key) else " (NeMo's default)")
        if row is None:
            made.no_equal.append((shown, UNKNOWN))
        elif row.convert is None:
            made.left_out.append((shown, row.note))
        elif value != MISSING:
            try:
                result = row.convert(value, file)
            except Agreed as reason:
                made.agreed.append((shown, str(reason)))
            except Refused as reason:
                made.no_equal.append((shown, str(reason)))
            except (TypeError, ValueError) as error:
                made.no_equal.append((shown, f"not a value that it can have ({error})"))
            else:
                _take(shown, result.values if isinstance(result, Keys) else {row.ours: result}, made, recipe)


def _take(shown: str, ours: Mapping[str, Any], made: Translation, recipe: Mapping[str, Any]) -> None:
    foreign = [key for key in ours if key not in recipe and not key.startswith(_FREE_FORM)]
    if foreign:
        made.no_equal.append((shown, f"recipe {made.recipe} has no {foreign[0]}"))
        return
    made.taken.append(shown)
    made.settings.update(ours)


def _lengths(file: NemoFile, made: Translation, recipe: Mapping[str, Any]) -> None:
    """NeMo-Aligner bounds whole examples, and leaves out preferences that are longer."""
    longest = made.settings.get("model.encoder_seq_length")
    if file.section in ("rm", "dpo", "kto"):
        made.settings["model.data.long_response"] = "drop"
    new_tokens = "model.rollout.max_new_tokens"
    room = made.settings.get(new_tokens, recipe.get(new_tokens)) if file.section in ON_POLICY else 1
    if isinstance(longest, int) and isinstance(room, int) and longest > room:
        made.settings["model.data.max_prompt_length"] = longest - room


def _typed(made: Translation, stand_ins: Mapping[str, Any]) -> RunConfig:
    """The run, with ``stand_ins`` for what is still to be set; values of a wrong type are taken out, and listed."""
    while True:
        with TemporaryDirectory() as folder:
            text = Translation(made.recipe, {**stand_ins, **made.settings}).yaml()
            (Path(folder) / "translated.yaml").write_text(text, encoding="utf-8")
            try:
                return compose.load_config("translated", (), folder)
            except ConfigError as error:
                named = [key for key in made.settings if re.search(rf"{re.escape(key)}(?![\w.])", str(error))]
                if not named:
                    raise
                reason = str(error).rpartition(": ")[2]
        made.no_equal += [(f"{key}={_text(made.settings.pop(key))}", reason) for key in named]


def _complaints(config: RunConfig) -> list[str]:
    """Every line with which a rule of ``checks`` refuses the run, where it can be judged beside the others."""
    wrong = list(filter(None, (rule(config) for rule in CHOICE_AND_RANGE_RULES)))
    if wrong:
        return wrong
    layout = list(islice(filter(None, (rule(config) for rule in LAYOUT_RULES)), 1))
    others = filter(None, (rule(config) for rule in (*RULES, *PEFT_RULES, *ROLLOUT_RULES, *EVALUATION_RULES)))
    return [*layout, *others]


def _mandatory(recipe: str) -> list[str]:
    return [key for key, value in _settings_of(recipe).items() if value == MISSING]


@cache
def _settings_of(recipe: str) -> Mapping[str, Any]:
    return _flat(yaml.safe_load(compose.describe_config(recipe)))


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _text(value: Any) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if text.isprintable() else repr(text)
