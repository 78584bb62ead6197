"""Encode rows in several processes, with a progress bar. What is cut, left out or refused is counted.

The processes are forks, as those of a DataLoader: they share the rows and the tokenizer, and nothing has to be pickled for them.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm import tqdm

from lightning_lora.data.reading import PlacedRow
from lightning_lora.data.records import NothingToLearn
from lightning_lora.data.store import Examples
from lightning_lora.utils.messages import counted

CHUNK = 256  # rows that a process takes at a time
WORTH = 4 * CHUNK  # rows for which a further process is worth its start
#: Encodes a row: examples, and what happened to it ("cut", "empty", ...) with a note for its place.
Encode = Callable[[Any], tuple[list[Any], dict[str, str]]]
_work: tuple[Sequence[PlacedRow], Encode, type] | None = None  # what forked processes inherit
T = TypeVar("T")


@dataclass
class Report:
    """What became of the rows.

    Attributes:
        rows: How many there were.
        counts: How many were "cut", "dropped", "empty", "left out" (`NothingToLearn`) or "lost": those of which cutting
            leaves nothing to learn.
        places: The first five places of each.
        unread: Keys of the first row that nothing reads.
    """

    rows: int
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def add(self, thing: str, place: str) -> None:
        """Count what happened to a row."""
        self.counts[thing] = self.counts.get(thing, 0) + 1
        if self.counts[thing] <= 5:
            self.places.setdefault(thing, []).append(place)

    def check(self, name: str, examples: int, max_length: int) -> None:
        """Refuse rows that would be lost, and sources of which nothing is left."""
        if lost := self.counts.get("lost"):
            more = ", ..." if lost > len(self.places["lost"]) else ""
            raise ValueError(
                f"{lost} of {self.rows} rows lose their answer to max_length={max_length}: {', '.join(self.places['lost'])}{more}; "
                "raise data.max_length, shorten their prompts, or set data.long_rows: drop"
            )
        if not examples:
            reasons = ", ".join(f"{count} {thing}" for thing, count in self.counts.items())
            first = f", first {self.places['left out'][0]}" if "left out" in self.places else ""
            raise ValueError(f"{name}: no row of {self.rows} is left ({reasons}{first})")

    def say(self, name: str, lengths: list[int], max_length: int, cached: bool) -> None:
        """Log the counts and lengths. Warn of rows that are cut, dropped or left out."""
        for thing, reason in (
            ("cut", f"to max_length={max_length} tokens"),
            ("dropped", f"as longer than max_length={max_length} tokens"),
            ("left out", "as nothing can be learnt from them"),
        ):
            if count := self.counts.get(thing):
                rank_zero_warn(f"{name}: {count} of {self.rows} rows are {thing} {reason}, first {self.places[thing][0]}")
        parts = [f"{counted(self.rows, 'row')}" + " (tokenized before)" * cached]
        parts += [f"{count} {thing}" for thing, count in self.counts.items()]
        parts += [f"{counted(len(lengths), 'example')}"] if len(lengths) != self.rows else []
        tokens = f"; {int(median(lengths))} tokens in the median row, {max(lengths)} in the longest" * (max(lengths) > 1)  # or images
        unread = f"; not read: {', '.join(self.unread)}" * bool(self.unread)
        rank_zero_info(f"{name}: {', '.join(parts)}{tokens}{unread}.")


def encode_rows(
    rows: Sequence[PlacedRow], encode: Encode, kind: type[T], title: str, processes: int | None = None
) -> tuple[Examples[T], Report]:
    """Encode all rows, in their order.

    Args:
        rows: The rows with their places.
        encode: See above.
        kind: The dataclass of the examples.
        title: What the progress bar says.
        processes: How many to use; None for as many as are worth it.

    Returns:
        The examples, and what became of the rows.

    Raises:
        ValueError: A row cannot be encoded. The message begins with its place.
    """
    global _work
    parts = [Examples.pack(kind, [])]
    report = Report(len(rows))
    chunks = range(0, len(rows), CHUNK)
    count = processes or max(1, min(_processors(), len(rows) // WORTH))
    _work = (rows, encode, kind)
    try:
        with tqdm(total=len(rows), desc=title, unit=" rows", leave=False, disable=True if len(rows) < WORTH else None) as bar:
            for done, columns, happened in _results(chunks, count):
                parts.append(Examples.of_arrays(kind, columns))
                bar.update(done)
                for thing, place in happened:
                    report.add(thing, place)
    finally:
        _work = None
    return Examples.joined(parts), report


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Result = tuple[int, dict[str, Any], list[tuple[str, str]]]  # rows, the examples' columns, and what happened to which row


def _results(chunks: range, count: int) -> Iterator[Result]:
    if count == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(_checked, map(_encode_chunk, chunks))
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"))  # multiprocessing's Pool waits for a killed process for ever
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)  # these processes only tokenize
            results = pool.map(_encode_chunk, chunks)
        yield from map(_checked, results)
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_chunk(start: int) -> Result | str:
    """Return the chunk's examples; of a bad row the message, because an exception would come with another process's traceback."""
    assert _work is not None
    rows, encode, kind = _work
    examples: list[Any] = []
    happened = []
    chunk = rows[start : start + CHUNK]
    for place, row in chunk:
        try:
            found, things = encode(row)
        except NothingToLearn as reason:
            found, things = [], {"left out": f": {reason}"}
        except ValueError as error:
            return f"{place}: {error}"
        examples += found
        happened += [(thing, place + note) for thing, note in things.items()]
    return len(chunk), Examples.pack(kind, examples).arrays(), happened


def _checked(result: Result | str) -> Result:
    if isinstance(result, str):
        raise ValueError(result)
    return result
