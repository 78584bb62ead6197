"""Every row of the table has a test that is marked with it."""

import re
from pathlib import Path

from tests.faults.table import ROWS


def test_every_row_has_a_test() -> None:
    texts = (path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    marked = {int(number) for text in texts for number in re.findall(r"(?:\brow\(|\bcase\()(\d+)[,)]", text)}
    assert marked == ROWS.keys() == set(range(1, 65))
