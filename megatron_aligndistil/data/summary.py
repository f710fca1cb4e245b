"""What became of the rows of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Summary:
    """Counts of one loaded data set. ``rows`` are rows read; the other counts are of examples and their tokens.

    ``fingerprint`` is a hash of all kept token ids, wherever the files lie and whatever they are called.
    """

    name: str
    rows: int
    kept: int
    truncated: int
    tokens: int
    response_tokens: int
    max_length: int
    fingerprint: str
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def mean_length(self) -> float:
        """Tokens an example."""
        return self.tokens / self.kept if self.kept else 0.0

    @property
    def dropped_text(self) -> str:
        """For instance "12 dropped (prompt over 1024 tokens: 12)"."""
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(self.dropped.items()))
        return f"{sum(self.dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")

    def line(self) -> str:
        """The summary in one log line."""
        return (
            f"{self.name}: {self.rows:,} rows, {self.kept:,} examples kept, {self.truncated:,} of them truncated, "
            f"{self.dropped_text}; {self.tokens:,} tokens, {self.response_tokens:,} of them in responses; "
            f"{self.mean_length:.0f} an example on average, at most {self.max_length:,}"
        )
