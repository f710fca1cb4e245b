"""A NeMo-Aligner configuration as its table of keys sees it: values by dotted key, and which program it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_aligndistil.errors import ConfigError

MISSING = "???"  # OmegaConf's mark of a mandatory value
# trainer.<section> of the programs that have a counterpart here, and the recipe.
RECIPES = {"sft": "sft", "rm": "reward_model", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}
ON_POLICY = ("ppo", "reinforce", "rs")
# model.dpo.preference_loss → recipe.
PREFERENCE_LOSSES = {"dpo": "dpo", "ipo": "ipo"}


@dataclass(frozen=True)
class NemoFile:
    """The file's values, interpolations resolved; ``algorithm`` is the recipe that it becomes.

    ``section`` is the name under ``trainer`` that the program reads its settings from.
    """

    values: Mapping[str, Any]
    section: str
    algorithm: str

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; ``default`` where it is absent, null or still to be set."""
        value = self.values.get(key)
        return default if value is None or value == MISSING else value

    def has(self, key: str) -> bool:
        return key in self.values


def recognise(values: Mapping[str, Any], path: str, algorithm: str | None) -> NemoFile:
    """Which program ``values`` are for. ``algorithm`` is a recipe that the user has named, or None.

    Raises:
        ConfigError: the file is of no program that has a counterpart here, and no recipe is named.
    """
    sections = {key.split(".")[1] for key in values if key.startswith("trainer.") and key.count(".") > 1}
    known = sorted(sections & RECIPES.keys())
    if len(known) > 1:
        raise ConfigError(f"{path}: trainer.{known[0]} and trainer.{known[1]}: settings of two programs; leave one")
    section = known[0] if known else min(sections, default="")
    if algorithm is not None:
        return NemoFile(values, section, algorithm)
    remedy = "give the recipe to translate it to: --algorithm <recipe>"
    if not known:
        what = f"trainer.{section} has no counterpart here" if section else "no section such as trainer.dpo"
        raise ConfigError(f"{path}: {what}; {remedy}")
    if section == "ppo" and not any(key.startswith("model.ppo.") for key in values):
        raise ConfigError(
            f"{path}: no model.ppo: a critic's file; translate the actor's, and give the critic's model and optimizer "
            "there as model.ppo.critic.path and model.ppo.critic.optim"
        )
    if section == "rm" and values.get("model.reward_model_type", "binary_ranking") != "binary_ranking":
        kind = values["model.reward_model_type"]
        raise ConfigError(f"{path}: model.reward_model_type={kind}: reward models here are binary_ranking; {remedy}")
    if section == "dpo":
        loss = values.get("model.dpo.preference_loss", "dpo")
        if loss not in PREFERENCE_LOSSES:
            known_losses = " and ".join(PREFERENCE_LOSSES)
            raise ConfigError(f"{path}: model.dpo.preference_loss={loss}: of these there are {known_losses}; {remedy}")
        return NemoFile(values, section, PREFERENCE_LOSSES[loss])
    return NemoFile(values, section, RECIPES[section])
