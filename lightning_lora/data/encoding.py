"""Encode rows in several processes, with a progress bar. What is cut, left out or refused is counted.

The processes are forks, as those of a DataLoader: they share the rows and the tokenizer, and nothing has to be pickled for them.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from lightning_lora.data.reading import PlacedRow

CHUNK = 256  # rows that a process takes at a time
WORTH = 4 * CHUNK  # rows for which a further process is worth its start
#: Encodes a row: examples, and what happened to it ("cut", "empty", ...) with a note for its place.
Encode = Callable[[Any], tuple[list[Any], dict[str, str]]]
_work: tuple[Sequence[PlacedRow], Encode] | None = None  # what forked processes inherit


def encode_rows(
    rows: Sequence[PlacedRow], encode: Encode, title: str, processes: int | None = None
) -> tuple[list[Any], Counter[str], dict[str, list[str]]]:
    """Encode all rows, in their order.

    Args:
        rows: The rows with their places.
        encode: See above.
        title: What the progress bar says.
        processes: How many to use; None for as many as are worth it.

    Returns:
        The examples, how many rows each thing happened to, and for each thing the first places.

    Raises:
        ValueError: A row cannot be encoded. The message begins with its place.
    """
    global _work
    examples: list[Any] = []
    counts: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    chunks = range(0, len(rows), CHUNK)
    count = processes or max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(rows) // WORTH))
    _work = (rows, encode)
    try:
        with tqdm(total=len(rows), desc=title, unit=" rows", leave=False, disable=True if len(rows) < WORTH else None) as bar:
            for done, found, happened in _results(chunks, count):
                examples += found
                bar.update(done)
                for thing, place in happened:
                    counts[thing] += 1
                    if counts[thing] <= 5:
                        places.setdefault(thing, []).append(place)
    finally:
        _work = None
    return examples, counts, places


Result = tuple[int, list[Any], list[tuple[str, str]]]


def _results(chunks: range, count: int) -> Iterator[Result]:
    if count == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(_checked, map(_encode_chunk, chunks))
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)  # these processes only tokenize
        pool = multiprocessing.get_context("fork").Pool(count)
    with pool:
        yield from map(_checked, pool.imap(_encode_chunk, chunks))


def _encode_chunk(start: int) -> Result | str:
    """Return the chunk's examples; of a bad row the message, because an exception would come with another process's traceback."""
    assert _work is not None
    rows, encode = _work
    examples: list[Any] = []
    happened = []
    chunk = rows[start : start + CHUNK]
    for place, row in chunk:
        try:
            found, things = encode(row)
        except ValueError as error:
            return f"{place}: {error}"
        examples += found
        happened += [(thing, place + note) for thing, note in things.items()]
    return len(chunk), examples, happened


def _checked(result: Result | str) -> Result:
    if isinstance(result, str):
        raise ValueError(result)
    return result
