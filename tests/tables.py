"""README's tables, read as the code that prints them would: row → column → cell."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def readme_table(corner: str) -> dict[str, dict[str, str]]:
    """The table whose first column is headed ``corner``."""
    found = re.findall(rf"^\| {re.escape(corner)} \|.*\n\|[-|]+\|\n(?:\|.*\n)+", README, re.MULTILINE)
    assert len(found) == 1, f"README has {len(found)} tables headed {corner!r}"
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines())
    assert all(len(row) == len(head) for row in rows)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
