"""Writing files so that a crash at any moment leaves the old one or the new one, whole.

The new content is staged beside the target (a rename is atomic only within one filesystem, and ``$TMPDIR`` is often
another), synced to disk, renamed over the target, and the folder synced so that the rename itself survives.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: str | Path, write: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file in one step.

    Args:
        path: the target; its folder must exist.
        write: the content, or a function that writes it to the open staging file.

    Raises:
        OSError: the disk is full or the folder read-only; the old file is intact and the staging file removed.
    """
    path = Path(path)
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(write) if isinstance(write, bytes) else write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(staged, 0o666 & ~_umask())  # mkstemp makes private files; this one is to be shared like any other
        os.replace(staged, path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Make renames and removals in a folder durable."""
    if os.name == "nt":  # no folder handles there; renames are journaled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
