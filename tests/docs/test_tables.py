"""The tables of what is supported, held against the code that prints them.

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
from tests.docs.pages import PAGES, table


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """``main`` silences its process, which here is the suite's."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        yield
    logger.setLevel(level)


def test_family_has_these_rows_columns_and_counts() -> None:
    kinds = table("family", "kind")
    assert [(kind, variant) for kind, row in kinds.items() for variant in row] == family.PAIRS
    refused = sum(cell == "refused" for row in kinds.values() for cell in row.values())
    without = sum(re.findall(r"\w+", cell).count(check) for row in kinds.values() for cell in row.values() for check in family.CHECKS)
    passed = (len(family.PAIRS) - refused) * len(family.CHECKS) - without
    assert f"`{passed} passed, {refused + without} refused, 0 failed`" in PAGES["family"]


def test_matrix_has_these_rows_columns_and_counts() -> None:
    strategies = table("strategies", "strategy")
    assert list(strategies) == [*STRATEGIES, *REFUSED]
    for name, row in strategies.items():
        assert row == dict.fromkeys(matrix.CELLS, matrix.SIGNS["refused" if name in REFUSED else "passed"]), name
    cells = len(matrix.CELLS)
    assert f"`{cells * len(STRATEGIES)} passed, {cells * len(REFUSED)} refused, 0 failed`" in PAGES["strategies"]


@pytest.mark.parametrize(
    "names",
    [["single", *REFUSED], pytest.param([*STRATEGIES, *REFUSED], marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
    ids=["what one process can run", "all"],
)
def test_matrix_prints_the_pages_lines(capsys: pytest.CaptureFixture[str], names: list[str]) -> None:
    assert matrix.main(names) == 0
    head, rule, *rows, count = capsys.readouterr().out.splitlines()
    assert f"{head}\n{rule}\n" in PAGES["strategies"]
    assert len(rows) == len(names) and all(f"\n{row}\n" in PAGES["strategies"] for row in rows), rows
    cells, refused = len(matrix.CELLS), len(set(names) & REFUSED.keys())
    assert count == f"{cells * (len(names) - refused)} passed, {cells * refused} refused, 0 failed"
