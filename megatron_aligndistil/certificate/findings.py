"""What a check measured, on one rank and over all of them; as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

NOT_FINITE = 1e300  # stands for an error that is NaN or infinite: JSON has neither


@dataclass(frozen=True)
class Measurement:
    """What one rank measured of one check.

    value_error     relative error of the values against dense float64, in the 2-norm
    gradient_error  the same of the gradients: the largest of all weights' together and of each; 0 where there is none
    words           elements a token that this rank contributed to collectives; None where it takes no part
    peak_bytes      held beside the inputs at the worst moment of forward and backward
    """

    value_error: float
    gradient_error: float
    words: float | None
    peak_bytes: int


@dataclass(frozen=True)
class Bounds:
    """What a measurement must not exceed; ``words`` must be met exactly."""

    value_error: float
    gradient_error: float
    words: float


@dataclass(frozen=True)
class Finding:
    """One line of the certificate. ``complaints`` say what exceeds its bound."""

    name: str
    layout: str
    value_error: float
    gradient_error: float
    words_per_token: float
    peak_bytes: int
    complaints: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.complaints

    @classmethod
    def judged(cls, name: str, layout: str, measured: Measurement, bounds: Bounds) -> Finding:
        """One rank's measurement against its bounds; NaN exceeds every bound."""
        complaints = []
        for what in ("value_error", "gradient_error"):
            found, bound = getattr(measured, what), getattr(bounds, what)
            if not found <= bound:
                complaints.append(f"{what.replace('_', ' ')} {found:.2e}, at most {bound:.2e}")
        if measured.words is not None and measured.words != bounds.words:
            complaints.append(f"{measured.words:g} words a token, not {bounds.words:g}")
        return cls(
            name,
            layout,
            _finite(measured.value_error),
            _finite(measured.gradient_error),
            0.0 if measured.words is None else measured.words,
            measured.peak_bytes,
            tuple(complaints),
        )

    def as_json(self) -> dict[str, str | float | int | bool]:
        """The keys that ``--json`` prints."""
        return {
            "name": self.name,
            "layout": self.layout,
            "value_error": self.value_error,
            "gradient_error": self.gradient_error,
            "words_per_token": self.words_per_token,
            "peak_bytes": self.peak_bytes,
            "passed": self.passed,
        }


def worst_over_ranks(by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """One finding a check from every rank's, which stand in the same order."""
    merged = []
    for same in zip(*by_rank, strict=True):
        first = next((finding for finding in same if not finding.passed), same[0])
        merged.append(
            Finding(
                first.name,
                first.layout,
                max(finding.value_error for finding in same),
                max(finding.gradient_error for finding in same),
                max(finding.words_per_token for finding in same),
                max(finding.peak_bytes for finding in same),
                first.complaints,
            )
        )
    return merged


HEADER = ("name", "layout", "value error", "gradient error", "words/token", "peak bytes", "result")


def rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """The cells under ``HEADER``."""
    return [
        (
            finding.name,
            finding.layout,
            f"{finding.value_error:.1e}",
            f"{finding.gradient_error:.1e}",
            f"{finding.words_per_token:g}",
            f"{finding.peak_bytes:,}",
            "pass" if finding.passed else "FAIL",
        )
        for finding in findings
    ]


def summary(findings: Sequence[Finding]) -> str:
    """One line a failed check, then the count."""
    failed = [finding for finding in findings if not finding.passed]
    lines = [f"FAIL {finding.name} {finding.layout}: {'; '.join(finding.complaints)}" for finding in failed]
    count = f"{len(failed)} of {len(findings)} failed" if failed else f"all {len(findings)} passed"
    return "\n".join([*lines, count])


def to_json(findings: Sequence[Finding]) -> str:
    """A list of objects, one a line."""
    return "[\n" + ",\n".join(json.dumps(finding.as_json(), allow_nan=False) for finding in findings) + "\n]\n"


def worst(errors: list[float]) -> float:
    """The largest; NaN if one is."""
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _finite(error: float) -> float:
    return error if math.isfinite(error) else NOT_FINITE
