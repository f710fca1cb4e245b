"""What an evaluation is to ``aligndistil evaluate``: questions, a judge, a report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_aligndistil.evaluation.benchmark import Answer, Question
from megatron_aligndistil.evaluation.judge import Judge
from megatron_aligndistil.report.analysis import Report

if TYPE_CHECKING:
    from megatron_aligndistil.launch.analysis_bench import Bench, Named
    from megatron_aligndistil.launch.evaluation_answers import Conversation


@dataclass(frozen=True)
class Scored:
    """Tables for people, and ``results`` for programs: model → metric → number (or a further mapping).

    files  further ones: name, which may have a folder before it, → text: raw judgments, answers
    """

    report: Report
    results: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)


class Evaluation(ABC):
    """One benchmark, its files read and checked: nothing is generated or asked before.

    max_new_tokens  of an answer, unless sampling.max_new_tokens is given
    questions       what each model answers; none where models don't answer
    reward_models   models that measure answers
    """

    max_new_tokens: int = 1024
    questions: Sequence[Question] = ()
    reward_models: Sequence[Named] = ()

    @abstractmethod
    def read_answers(self, key: str, path: Path) -> list[Answer]:
        """Ready answers, in the benchmark's own format, in the order of ``questions``; ``key`` names them in messages.

        Raises:
            DataError: a row is missing, is there twice or out of order, or isn't of the format: file, row, remedy.
        """

    def measure(
        self, bench: Bench, drawn: Mapping[str, Sequence[Conversation]], ready: Mapping[str, Sequence[Answer]]
    ) -> None:
        """On every rank, while the layout is there: what models measure of answers."""
        return

    @abstractmethod
    def score(self, answers: Mapping[str, Sequence[Answer]], judge: Judge | None) -> Scored:
        """Ask the judge about every model's answers, and come to the figures.

        Raises:
            DataError: as ``Judge.ask``.
        """
