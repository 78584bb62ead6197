"""Refuse a checkpoint that would take more memory than it has bytes, or whose bytes are not those that were written.

``torch.save`` writes a zip archive without compression, with a checksum (CRC-32) per record. ``torch.load`` does not compare it. So sizes
are checked before torch reads the records, and checksums before anyone uses what it read. A tensor may also be a view that repeats its
stored values, of any size. A copy of it would take that size. So may a list that holds another one many times.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

SMALL = 64 * 2**20  # bytes; a tensor up to this size is always accepted, such as a mask that was expanded
MANY = 2**18  # entries; so many are always accepted
DEPTH = 100  # levels; Python itself ends at 1,000 calls in one another, and what is done with a checkpoint takes several a level
_CHUNK = 2**20


def check_records(file: BinaryIO) -> None:
    """Check the sizes of a zip archive's records. A file of another kind is left to torch.

    Args:
        file: the open file, at its start. It is at its start again afterwards.

    Raises:
        ValueError: the records are compressed, or larger than the file.
        zipfile.BadZipFile: the archive is damaged.
    """
    begins, size = file.read(4), file.seek(0, 2)
    file.seek(0)
    if begins == b"PK\3\4":
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records) or sum(each.file_size for each in records) > size:
                raise ValueError(f"its {size:,} bytes stand for more: torch.save writes no compressed records")
    file.seek(0)


def check_checksums(file: BinaryIO) -> None:
    """Compare the checksums of a zip archive's records. A file of another kind is left to torch.

    Args:
        file: the open file, at its start, whose records :func:`check_records` has checked.

    Raises:
        zipfile.BadZipFile: a record is not what was written, or the archive is damaged.
    """
    begins = file.read(4)
    file.seek(0)
    if begins == b"PK\3\4":
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC:  # 0 is what torch writes after torch.serialization.set_crc32_options(False)
                    with archive.open(record) as stream:
                        while stream.read(_CHUNK):
                            pass
    file.seek(0)


def check_tensors(content: Any, size: int) -> None:
    """Check nested mappings and sequences: how deep they are, tensors larger than the file, and more entries than it has bytes.

    An entry takes a byte at least. Only lists that hold one other list several times have more, and may have 2^40 of them.

    Args:
        content: the content of the file.
        size: the file's size in bytes.

    Raises:
        ValueError: a tensor is larger, there are more entries, or more than ``DEPTH`` levels.
    """
    for number, value in enumerate(_entries(content)):
        if number > max(size, MANY):
            raise ValueError(f"it has more entries than its {size:,} bytes can hold")
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            whole = value.numel() * value.element_size()
            if whole > max(size, SMALL):
                raise ValueError(f"a tensor of shape {tuple(value.shape)} has {whole:,} bytes, the file {size:,}")


def _entries(content: Any, level: int = 0) -> Iterator[Any]:
    """Yield a value, and what is nested in it."""
    if level > DEPTH:
        raise ValueError(f"it is nested in more than {DEPTH} levels")
    yield content
    if isinstance(content, (dict, list, tuple, set, frozenset)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _entries(value, level + 1)
