"""``aligndistil evaluate judge-agreement`` (paper Table 6): how far a judge can be trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_aligndistil.config.evaluation_schema import JudgeAgreementEvaluationConfig
from megatron_aligndistil.data.records import read_records
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.evaluation.agreement import Agreement, agreement
from megatron_aligndistil.evaluation.benchmark import Answer
from megatron_aligndistil.evaluation.intervals import Estimate
from megatron_aligndistil.evaluation.judge import Judge
from megatron_aligndistil.evaluation.pairwise import PROMPT, Judged, Pair, judge_pairs
from megatron_aligndistil.launch.analysis_answers import text_of
from megatron_aligndistil.launch.analysis_bench import sampled
from megatron_aligndistil.launch.evaluate_pairwise import judge_prompt
from megatron_aligndistil.launch.evaluation_task import Evaluation, Scored
from megatron_aligndistil.report.analysis import Report, Table, csv_cells, percent
from megatron_aligndistil.types import Record

NAME, MAX_TOKENS = "judge_agreement", 512
JUDGMENTS_FILE = "judgments.jsonl"
LABELS = {
    "agreement": "agrees with people",
    "agreement_longer": "… where they prefer the longer response",
    "agreement_shorter": "… where they prefer the shorter",
    "prefers_first": "verdicts for the response shown first",
    "consistent": "same verdict in both orders",
    "prefers_longer": "prefers the longer response",
    "people_prefer_longer": "people prefer the longer",
    "length_bias": "difference of the two",
}


def prepare(config: JudgeAgreementEvaluationConfig) -> JudgeAgreement:
    """The pairs, read."""
    own = config.benchmark
    prompt = judge_prompt(own.judge_prompt, PROMPT)
    records = [record for name in own.pairs for record in read_records(name, "preference")]
    if not records:
        raise DataError(f"benchmark.pairs={own.pairs}: no rows; name preference pairs")
    return JudgeAgreement(config, prompt, [records[i] for i in sampled(len(records), own.limit, config.seed)])


class JudgeAgreement(Evaluation):
    """Preference pairs, of which people preferred the chosen response, before a judge."""

    def __init__(self, config: JudgeAgreementEvaluationConfig, prompt: str, records: Sequence[Record]) -> None:
        self._config, self._prompt, self._records = config, prompt, records

    def read_answers(self, key: str, path: Path) -> list[Answer]:
        """No model answers."""
        raise ConfigError(f"{key}={path}: no model answers here; remove it")

    def score(self, answers: Mapping[str, Sequence[Answer]], judge: Judge | None) -> Scored:
        """Both orders of every pair."""
        assert judge is not None
        pairs = [Pair(text_of(record.prompt), *record.responses) for record in self._records]
        judged = judge_pairs(judge, self._prompt, pairs, self._config.judge.max_tokens or MAX_TOKENS)
        verdicts_P2 = np.array(
            [[np.nan if seen is None else seen for seen in order] for order in (judged.first, judged.second)]
        ).T
        longer_P = np.array([len(pair.answer) - len(pair.baseline) for pair in pairs])
        found = agreement(verdicts_P2, longer_P, self._config.bootstrap_samples, self._config.seed)
        name = judge.endpoint.model
        return Scored(self._report(name, found), {name: asdict(found)}, {JUDGMENTS_FILE: self._judgments(judged)})

    def _report(self, judge: str, found: Agreement) -> Report:
        estimates: dict[str, Estimate] = {name: getattr(found, name) for name in LABELS}
        rows = [[LABELS[name], percent(estimate)] for name, estimate in estimates.items()]
        return Report(
            name=NAME,
            title=f"Judge: {judge}",
            tables=[Table(["share, %", f"{found.pairs} pairs"], rows)],
            columns=("quantity", "value", "low", "high"),
            records=[(name, *csv_cells(estimate)) for name, estimate in estimates.items()],
            notes=[
                "Every pair in both orders; a tie counts as half. Verdicts that could not be read, of "
                f"{2 * len(self._records)}, and so count for nothing: {found.unreadable}. Lengths are in characters. "
                f"In brackets: 95 % intervals of {self._config.bootstrap_samples} bootstrap samples of the pairs (seed "
                f"{self._config.seed}).",
            ],
        )

    def _judgments(self, judged: Judged) -> str:
        """A line a pair: what the judge said, the preferred response shown first and second, and for whom."""
        rows = zip(self._records, judged.texts, judged.first, judged.second, strict=True)
        return "".join(
            json.dumps({"row": record.origin, "said": said, "for_preferred": [first, second]}, ensure_ascii=False)
            + "\n"
            for record, said, first, second in rows
        )
