"""Algorithm names and what builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_aligndistil.algorithms.algorithm import Algorithm
from megatron_aligndistil.algorithms.aligndistil import aligndistil
from megatron_aligndistil.algorithms.dpo import cdpo, dpo, reverse_dpo
from megatron_aligndistil.algorithms.ipo import ipo
from megatron_aligndistil.algorithms.kto import kto
from megatron_aligndistil.algorithms.policy_gradient import sentence_pg, token_pg
from megatron_aligndistil.algorithms.ppo import ppo, rto
from megatron_aligndistil.algorithms.reward_model import reward_model
from megatron_aligndistil.algorithms.sft import sft
from megatron_aligndistil.algorithms.simpo import simpo
from megatron_aligndistil.algorithms.tdpo import tdpo1, tdpo2

ALGORITHMS: Mapping[str, Callable[[Any], Algorithm]] = {
    "sft": sft,
    "dpo": dpo,
    "reverse_dpo": reverse_dpo,
    "cdpo": cdpo,
    "tdpo1": tdpo1,
    "tdpo2": tdpo2,
    "simpo": simpo,
    "ipo": ipo,
    "kto": kto,
    "aligndistil": aligndistil,
    "reward_model": reward_model,
    "ppo": ppo,
    "rto": rto,
    "sentence_pg": sentence_pg,
    "token_pg": token_pg,
}
