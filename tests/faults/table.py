"""The fault table: how many trials of each fault a run survived, and how many of them went on to the bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

TABLE_VARIABLE = "FAULT_TABLE"  # a file that collects rows, for 'make faults' to print


def record(fault: str, trials: int, survived: int, identical: int) -> None:
    """Print a row, keep it where a table is made, and fail unless everything was survived to the bit."""
    row = {"fault": fault, "trials": trials, "survived": survived, "bit-identical": identical}
    print(json.dumps(row))
    if path := os.environ.get(TABLE_VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    assert trials == survived == identical > 0, row


def rendered(path: Path) -> str:
    """The table as Markdown, rows of one fault added up."""
    totals: dict[str, list[int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        fault, *numbers = json.loads(line).values()
        totals[fault] = [total + number for total, number in zip(totals.get(fault, [0, 0, 0]), numbers, strict=True)]
    rows = [(fault, *map(str, numbers)) for fault, numbers in totals.items()]
    rows.append(("all", *(str(sum(column)) for column in zip(*totals.values(), strict=True))))
    header = ("fault", "trials", "survived", "bit-identical")
    width = max(len(fault) for fault, *_ in [header, *rows])
    lines = [f"| {fault:<{width}} | " + " | ".join(f"{cell:>13}" for cell in cells) + " |" for fault, *cells in rows]
    head = f"| {header[0]:<{width}} | " + " | ".join(f"{name:>13}" for name in header[1:]) + " |"
    return "\n".join([head, f"|{'-' * (width + 2)}|" + "--------------:|" * 3, *lines])


if __name__ == "__main__":
    print(rendered(Path(os.environ[TABLE_VARIABLE])))
