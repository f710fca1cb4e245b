"""A reward that a Python function of the user gives, named in the configuration."""

from __future__ import annotations

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_aligndistil.errors import RolloutError

KEY = "model.reward.function"


@dataclass(frozen=True)
class RewardFunction:
    """``call(prompts, responses)`` gives one finite number a response; ``name`` is ``module:name``."""

    name: str
    call: Callable[[list[str], list[str]], Sequence[float]]

    @classmethod
    def named(cls, name: str) -> RewardFunction:
        """The function ``module:name``; modules are found in the current folder too.

        Raises:
            RolloutError: no such module or function, or importing the module fails.
        """
        module, _, attribute = name.partition(":")
        if not module or not attribute:
            raise RolloutError(f"{KEY}={name}: not of the form module:function, such as rewards:politeness")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            found = importlib.import_module(module)
        except Exception as error:
            raise RolloutError(f"{KEY}={name}: importing {module} fails: {_place(error)}; correct it") from error
        call = getattr(found, attribute, None)
        if not callable(call):
            raise RolloutError(f"{KEY}={name}: {module} has no function {attribute}; correct the name")
        return cls(name, call)

    def scores(self, prompts: Sequence[str], responses: Sequence[str], origins: Sequence[str]) -> np.ndarray:
        """The rewards of the responses, float64 [N].

        Raises:
            RolloutError: the function raises, or gives another number of values or one that isn't finite.
        """
        try:
            given = self.call(list(prompts), list(responses))
            values = [float(value) for value in given]
        except Exception as error:
            raise RolloutError(f"{KEY}={self.name}: raises {_place(error)}; correct the function") from error
        if len(values) != len(responses):
            raise RolloutError(
                f"{KEY}={self.name}: gives {len(values)} values for {len(responses)} responses; return one each"
            )
        for value, origin, response in zip(values, origins, responses, strict=True):
            if not math.isfinite(value):
                raise RolloutError(
                    f"{KEY}={self.name}: gives {value} for {origin}, response {response[:60]!r}; return a finite number"
                )
        return np.asarray(values, dtype=np.float64)


def _place(error: BaseException) -> str:
    """``ValueError: too short (rewards.py:12)``, the innermost line of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
