"""README's tables of what is supported, held against the code that prints them.

The marks of ``make family`` are compared pair by pair in test_family.py, where the pairs run.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator

import pytest

from tests import family, matrix
from tests.distributed.runs import REFUSED, STRATEGIES
from tests.tables import README, readme_table


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """``main`` silences its process, which here is the suite's."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        yield
    logger.setLevel(level)


def test_family_has_these_rows_columns_and_counts() -> None:
    table = readme_table("kind")
    assert [(kind, variant) for kind, row in table.items() for variant in row] == family.PAIRS
    refused = sum(cell == "refused" for row in table.values() for cell in row.values())
    without = sum(re.findall(r"\w+", cell).count(check) for row in table.values() for cell in row.values() for check in family.CHECKS)
    passed = (len(family.PAIRS) - refused) * len(family.CHECKS) - without
    assert f"`{passed} passed, {refused + without} refused, 0 failed`" in README


def test_matrix_has_these_rows_columns_and_counts() -> None:
    table = readme_table("strategy")
    assert list(table) == [*STRATEGIES, *REFUSED]
    for name, row in table.items():
        assert row == dict.fromkeys(matrix.CELLS, matrix.SIGNS["refused" if name in REFUSED else "passed"]), name
    cells = len(matrix.CELLS)
    assert f"`{cells * len(STRATEGIES)} passed, {cells * len(REFUSED)} refused, 0 failed`" in README


@pytest.mark.parametrize(
    "names",
    [["single", *REFUSED], pytest.param([*STRATEGIES, *REFUSED], marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
    ids=["what one process can run", "all"],
)
def test_matrix_prints_readmes_lines(capsys: pytest.CaptureFixture[str], names: list[str]) -> None:
    assert matrix.main(names) == 0
    head, rule, *rows, count = capsys.readouterr().out.splitlines()
    assert f"{head}\n{rule}\n" in README
    assert len(rows) == len(names) and all(f"\n{row}\n" in README for row in rows), rows
    cells, refused = len(matrix.CELLS), len(set(names) & REFUSED.keys())
    assert count == f"{cells * (len(names) - refused)} passed, {cells * refused} refused, 0 failed"
