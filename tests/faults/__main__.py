"""``make faults``: every row of the table of faults with its state, found by running the tests that are marked with it.

The last line counts the rows whose tests all pass: ``N of 64``. The exit code is the number of the others.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.table import ROWS

ORDER = ("failed", "known", "skipped", "passed")  # a row's state is the first of these that one of its tests has


@dataclass(eq=False)  # pytest keeps its plugins in sets
class Rows:
    """A pytest plugin that keeps the marked tests and records how they end."""

    of: dict[str, set[int]] = field(default_factory=dict)
    found: dict[int, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    reasons: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep only what belongs to a row."""
        self.of = {item.nodeid: rows for item in items if (rows := {mark.args[0] for mark in item.iter_markers("row")})}
        items[:] = [item for item in items if item.nodeid in self.of]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test ended; a failure in its setup or teardown counts as one."""
        outcome = "known" if hasattr(report, "wasxfail") and report.outcome == "skipped" else report.outcome
        for row in self.of[report.nodeid]:
            before = self.found[row].get(report.nodeid, "passed")
            self.found[row][report.nodeid] = min(before, outcome, key=ORDER.index)
            if outcome == "known":
                self.reasons[row].add(report.wasxfail)

    def state(self, row: int) -> str:
        """What the table says of a row."""
        ends = self.found.get(row, {}).values()
        if not ends:
            return "NO TEST"
        worst = min(ends, key=ORDER.index)
        if worst == "passed":
            return "right"
        return f"known: {'; '.join(sorted(self.reasons[row]))}" if worst == "known" else worst.upper()


def main(arguments: list[str]) -> int:
    """Print the table; return the number of rows that are not right."""
    rows = Rows()
    options: list[Any] = ["-q", "-m", "row and not slow", "--no-header", "-p", "no:cacheprovider"]
    pytest.main([*options, *(arguments or [str(Path(__file__).parents[1])])], plugins=[rows])
    print("\n| row | fault | tests | state |\n|---|---|---|---|")
    states = {row: rows.state(row) for row in ROWS}
    for row, state in states.items():
        print(f"| {row} | {ROWS[row]} | {len(rows.found.get(row, {}))} | {state} |")
    right = sum(state == "right" for state in states.values())
    print(f"{right} of {len(ROWS)}")
    return len(ROWS) - right


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
