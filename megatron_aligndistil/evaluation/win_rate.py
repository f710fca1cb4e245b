"""The win rate of a policy under training over its own answers from before."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_aligndistil.errors import DataError
from megatron_aligndistil.evaluation.judge import Judge
from megatron_aligndistil.evaluation.pairwise import Pair, judge_pairs
from megatron_aligndistil.evaluation.request_threads import Stopped

logger = logging.getLogger(__name__)

_PAIRS_A_TIME = 4  # times the judge's concurrency: pairs between two writes of what is known so far
_COUNTED = ("skipped", "cached", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class WinRate:
    """Figures of one evaluation, and what each row gets: who won, and the judge's words; empty where it failed."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """A judge and how it is asked. A judge that fails costs a figure, never the run."""

    judge: Judge
    prompt: str
    max_tokens: int

    def win_rate(self, pairs: Sequence[Pair], stop: threading.Event) -> WinRate | None:
        """Of the pairs' answers over their baselines, in both orders; None where ``stop`` is set meanwhile."""
        before, rows = asdict(self.judge.usage), list[dict[str, Any]]()
        metrics, unreadable = {"judge_failures": 0.0}, 0
        window = _PAIRS_A_TIME * self.judge.endpoint.concurrency
        self.judge.stop = stop
        try:
            for start in range(0, len(pairs), window):
                judged = judge_pairs(self.judge, self.prompt, pairs[start : start + window], self.max_tokens)
                unreadable += judged.verdicts.unreadable
                won = [None if np.isnan(value) else float(value) for value in judged.verdicts.won_P]
                rows += [{"won": own, "judge": list(said)} for own, said in zip(won, judged.texts, strict=True)]
        except Stopped:
            return None
        except DataError as error:
            logger.warning("no win rate in this evaluation: %s", error)
            metrics, rows = {"judge_failures": 1.0}, []
        else:
            metrics["judge_unreadable"] = float(unreadable)
        known = [row["won"] for row in rows if row["won"] is not None]
        if known:
            metrics["win_rate"] = sum(known) / len(known)
        usage = asdict(self.judge.usage)
        return WinRate(metrics | {f"judge_{name}": float(usage[name] - before[name]) for name in _COUNTED}, rows)


def first_answers(path: Path, prompts: Sequence[str]) -> list[str]:
    """The answers from before training, by the rows that were left there.

    Raises:
        DataError: there are none, or they are to other prompts.
    """
    remedy = "remove evaluation.judge to go on, or start a new run"
    if not path.is_file():
        raise DataError(f"{path}: no answers from before training, which the judge compares with; {remedy}")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        asked, answers = [row["prompt"] for row in rows], [str(row["answer"]) for row in rows]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    if asked != list(prompts):
        raise DataError(f"{path}: answers to other prompts than those of evaluation; give those, {remedy}")
    return answers
