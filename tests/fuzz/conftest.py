"""The table of all readers at the end, and time limits that leave SIGALRM to the readers'."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.reader import FORM, SHARES, Tally, table

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(3600, method="thread"))


@pytest.fixture
def record(record_property: pytest.FixtureRequest):
    """Takes the tally of a reader for the table."""

    def keep(tally: Tally) -> None:
        record_property(FORM, tally.as_row())

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = [value for report in reports for name, value in report.user_properties if name == FORM]
    if rows:
        terminalreporter.section("malformed inputs")
        order = list(SHARES)
        for line in table(sorted(rows, key=lambda row: order.index(row["reader"]))):
            terminalreporter.write_line(line)
