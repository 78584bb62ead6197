"""Refuse a checkpoint that would take more memory than it has bytes, or whose bytes are not those that were written.

``torch.save`` writes a zip archive without compression. ``torch.load`` does not look at the checksum (CRC-32) of each record, so they are
checked before torch reads them. A tensor may also be a view that repeats what is stored, of any size. It would take that size
once it is copied.
"""

from __future__ import annotations

import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

SMALL = 64 * 2**20  # bytes that a tensor of any file may have, such as a mask that was expanded
_CHUNK = 2**20


def check_records(file: BinaryIO) -> None:
    """Check the records of a zip archive. A file of another kind is left to torch.

    Args:
        file: at its start, and again afterwards.

    Raises:
        ValueError: they are larger than the file, or are not what was written.
        zipfile.BadZipFile: the same of one record, or the archive is damaged.
    """
    begins, size = file.read(4), file.seek(0, 2)
    file.seek(0)
    if begins == b"PK\3\4":
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records) or sum(each.file_size for each in records) > size:
                raise ValueError(f"its {size:,} bytes stand for more: torch.save writes no compressed records")
            for record in records:
                if record.CRC:  # 0 is what torch writes after torch.serialization.set_crc32_options(False)
                    with archive.open(record) as stream:
                        while stream.read(_CHUNK):
                            pass
    file.seek(0)


def check_tensors(content: Any, size: int) -> None:
    """Check nested mappings and sequences for tensors that are larger than the file.

    Args:
        content: what was read.
        size: of the file, in bytes.

    Raises:
        ValueError: there is one.
    """
    if isinstance(content, Tensor):
        whole = content.numel() * content.element_size()
        if content.layout == torch.strided and not content.is_meta and whole > max(size, SMALL):
            raise ValueError(f"a tensor of shape {tuple(content.shape)} has {whole:,} bytes, the file {size:,}")
    elif isinstance(content, dict):
        for value in content.values():
            check_tensors(value, size)
    elif isinstance(content, (list, tuple, set, frozenset)):
        for value in content:
            check_tensors(value, size)
