"""The same models as LoRA adapters: the language models over the initial one, the scalar ones over their own base.

The reference forms W + (alpha / R) B A and lets autograd do the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_aligndistil.certificate.dense_model import Weights
from megatron_aligndistil.certificate.models import DRIFT, EARLIER, ROLES, SCALAR_ROLES, World
from megatron_aligndistil.models.families.lora import PEFT_DOWN, PEFT_UP
from megatron_aligndistil.models.gathering import adapter_lines
from megatron_aligndistil.models.lora import LoRASettings

SETTINGS = LoRASettings(rank=3, alpha=4.5)
BASE = "initial"
SCORE = "score.weight"


@dataclass(frozen=True, eq=False)
class AdaptedWorld(World):
    """A world whose models are adapters; of a model, only they and a scalar head are trained."""

    _adapters: dict[str, Weights] = field(default_factory=dict)

    def base(self, role: str) -> Weights:
        """What a role's adapter lies over."""
        return super().weights(role if role in SCALAR_ROLES else BASE)

    def adapter(self, role: str) -> Weights:
        """A role's A's and B's under Hugging Face names; the initial model has none."""
        if role == BASE:
            return {}
        if role not in self._adapters:
            generator = torch.Generator().manual_seed(100 + ROLES.index(role))
            later = self.adapter(EARLIER[role]) if role in EARLIER else None
            made = {}
            for entry, layer in adapter_lines(SETTINGS, self.architecture):
                for name, shape in entry.hf_shapes(self.architecture, layer).items():
                    noise = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
                    made[name] = later[name] + DRIFT * noise if later else noise
            self._adapters[role] = made
        return self._adapters[role]

    def weights(self, role: str) -> Weights:
        """The whole weights of a role."""
        return self.assembled(role, self.trained(role))

    def trained(self, role: str) -> Weights:
        """What training a role changes."""
        head = {SCORE: self.base(role)[SCORE]} if role in SCALAR_ROLES else {}
        return self.adapter(role) | head

    def assembled(self, role: str, trained: Weights) -> Weights:
        """The whole weights that ``trained`` comes to, differentiable."""
        whole = self.base(role) | {name: weight for name, weight in trained.items() if name == SCORE}
        for name, down in trained.items():
            if name.endswith(PEFT_DOWN):
                module = name.removesuffix(PEFT_DOWN)
                whole[f"{module}weight"] = whole[f"{module}weight"] + _update(trained[f"{module}{PEFT_UP}"], down)
        return whole


def _update(up: Tensor, down: Tensor) -> Tensor:
    return SETTINGS.alpha / SETTINGS.rank * (up @ down)
