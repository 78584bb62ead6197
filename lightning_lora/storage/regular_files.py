"""Open a file from an unknown source: a FIFO would hang, and a link to a device would fill the memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


class WrongPath(ValueError, FileNotFoundError):
    """A path that the user gave leads to nothing, or to something of another kind."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Links are followed.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path is a folder, a FIFO, a socket or a device.
        OSError: the file cannot be opened.
    """
    # The open file is checked, because the path could name another file by then. Without O_NONBLOCK, opening a FIFO waits for a writer.
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file.")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is a device or a pipe, not a file.")
    return os.fdopen(handle, "rb")


def said_instead(path: Path) -> str:
    """Return what stands in place of a file that cannot be read, as a download may leave it, with the cure; nothing for other content."""
    start = path.read_bytes()[:200].lstrip().lower() if path.is_file() and path.stat().st_size < 1 << 20 else b""
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: run git lfs pull, or download the file"
    return "a web page, not the file: download it again" if start.startswith((b"<!doctype", b"<html")) else ""


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        limit: the largest size in bytes.

    Raises:
        ValueError: the file is larger, or not a regular file.
        OSError: as :func:`open_regular`.
    """
    with open_regular(path) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, which such a file never has.")
    return data
