"""Print tables and JSON. A pipe gets neither colour nor cut lines; rich itself respects ``NO_COLOR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

WIDE = 10_000  # columns where nothing cuts a line: in a pipe or a file


def console(stderr: bool = False) -> Console:
    """Return a console on stdout or stderr as they are now."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, emoji=False, markup=False, width=None if stream.isatty() else WIDE)


def print_json(content: Any) -> None:
    """Print one JSON value on one line."""
    print(json.dumps(content, ensure_ascii=False, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows in columns. Numbers are aligned at the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(header))
    for index, name in enumerate(header):
        numbers = bool(rows) and all(type(row[index]) in (int, float) for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    on_stdout = console()
    with on_stdout.capture() as captured:
        on_stdout.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_pairs(pairs: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    print_table(("", ""), list(pairs.items()))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr, if it is a terminal, that something long goes on."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(what, spinner="line"):
        yield


def _cell(value: Any) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )
