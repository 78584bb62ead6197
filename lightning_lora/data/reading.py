"""Read rows from files, each with its place: jsonl, json, csv, tsv, parquet, a folder of the library ``datasets``, or a hub id."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_lora.data.hub import names_dataset, read_dataset, read_parquet
from lightning_lora.data.messages import check_characters
from lightning_lora.storage.regular_files import WrongPath

# How files begin that are no text, and the endings that they usually have.
PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"PK\x03\x04": ".zip"}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that an object has twice: the first value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in [other for other, _ in pairs[:number]])
        raise ValueError(f"the key {twice!r} is there twice; remove one")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)
#: A row's place ("file:line"), and the parsed row.
PlacedRow = tuple[str, Any]
BOMS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def read_rows(source: str, slot: str, subset: str | None = None, streaming: bool = False) -> Iterator[PlacedRow]:
    """Yield the rows of a source, blank lines left out.

    Args:
        source: A file (its name's ending is its format), a folder, or a hub id: ``owner/name``, or ``owner/name:split``.
        slot: "train", "val", "test" or "predict", for errors and a data set's split.
        subset: A data set's configuration.
        streaming: Read a data set while it is downloaded.

    Yields:
        The place ("file:line", or "name:row" where there are no lines) and the row.

    Raises:
        ImportError: The source needs the package ``datasets``; the message names the extra.
        WrongPath: There is no such file.
        ValueError: It cannot be parsed, or it is not text.
    """
    path = Path(source)
    if not source.strip():
        raise WrongPath(f"data.{slot}={source!r} is empty; name a file")
    if not path.is_file() and path.suffix not in READERS and names_dataset(source):
        return read_dataset(source, slot, subset, streaming)
    if not path.is_file():
        raise WrongPath(f"data.{slot}={source!r}: no such file (seen from {Path.cwd()})")
    if path.suffix in PACKED.values():
        raise ValueError(f"data.{slot}={source!r} is packed; unpack it, and name the file {path.stem!r}")
    if path.suffix not in READERS:
        raise ValueError(f"data.{slot}={source!r}: the ending {path.suffix!r} is of no format; rename it to one of {', '.join(READERS)}")
    return READERS[path.suffix](path)


def text_of_file(path: Path) -> str:
    """Return a file's text, with ``\\n`` for every line end.

    Raises:
        ValueError: It is no text, or of no encoding that is known here; the message names the line.
    """
    raw = path.read_bytes()
    kind = next((ending for mark, ending in {**PACKED, b"PAR1": ".parquet"}.items() if raw.startswith(mark)), None)
    if kind is not None:
        raise ValueError(f"{path} is no text, but begins as a {kind} file; {'rename' if kind == '.parquet' else 'unpack'} it")
    encoding = next((name for mark, name in BOMS.items() if raw.startswith(mark)), None) or _unmarked(raw)
    try:
        return raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line} is not {encoding.upper().removesuffix('-SIG')} ({error.reason} at byte {error.start}); save the file as UTF-8 "
            f"(as from Windows: iconv -f windows-1252 -t utf-8 {path.name} > new{path.suffix})"
        ) from error


def _unmarked(raw: bytes) -> str:
    """Return the encoding of a file without a mark. In UTF-16 every second byte of plain characters is zero; UTF-8 text has none."""
    start = raw[:200]
    return next((name for name, odd in (("utf-16-le", 1), ("utf-16-be", 0)) if start and start[odd::2].count(0) * 4 > len(start)), "utf-8")


def _read_json(path: Path) -> Iterator[PlacedRow]:
    """Read one object per line, an array, or objects over several lines, whatever the ending says."""
    text = text_of_file(path)
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first.lstrip().startswith("["):
        return _read_array(path, text)
    try:
        json.loads(first)
    except (RecursionError, ValueError) as error:
        if getattr(error, "pos", 0) >= len(first.rstrip()) > 0:  # it goes on in the next line
            return _read_values(path, text, 0)
    return _read_lines(path, text)


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """Name the place of what cannot be parsed within."""
    try:
        yield
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f'{place} is not JSON ({error.msg} at {at}); a line is like {{"prompt": "...", "response": "..."}}') from error
    except (RecursionError, ValueError) as error:  # nested a thousand deep, or a number of thousands of digits
        raise ValueError(f"{place} cannot be read as JSON ({error})") from error


def _read_lines(path: Path, text: str) -> Iterator[PlacedRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            with _placed(place):
                row = DECODER.decode(line)
                check_characters(line, row)
            yield place, row


def _read_array(path: Path, text: str) -> Iterator[PlacedRow]:
    end = len(text.rstrip())
    if not text.endswith("]", 0, end):
        raise ValueError(f"{path}:{text.count(chr(10), 0, end) + 1} the array that begins the file has no end; close it with ]")
    return _read_values(path, text[: end - 1], text.index("[") + 1)


def _read_values(path: Path, text: str, position: int) -> Iterator[PlacedRow]:
    """Read values one after another, with or without commas between them."""
    separators = re.compile(r"[\s,]*")
    line, counted = 1, 0
    while (position := separators.match(text, position).end()) < len(text):  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        with _placed(f"{path}:{line}"):
            row, position = DECODER.raw_decode(text, counted)
            check_characters(text[counted:position], row)
        yield f"{path}:{line}", row


def _read_table(path: Path) -> Iterator[PlacedRow]:
    """Read comma, semicolon or tab separated values with a header; the header tells which."""
    text = text_of_file(path)
    header = text.lstrip("\n").partition("\n")[0]
    limit = csv.field_size_limit(sys.maxsize)  # its default refuses texts of over 128 KiB
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
        names: list[str] = []
        start = 1
        for fields in reader:
            place, start = f"{path}:{start}", reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if not names:
                names = [name.strip() for name in fields]
                if len(set(names)) < len(names):
                    raise ValueError(f"{place}: the header names a column twice: {names}; rename one")
            elif len(fields) != len(names):
                raise ValueError(f"{place}: {len(fields)} fields, but the header names {len(names)}; put texts with separators in quotes")
            else:
                yield place, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is not csv ({error})") from error
    finally:
        csv.field_size_limit(limit)


READERS: dict[str, Callable[[Path], Iterator[PlacedRow]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": read_parquet,
}
