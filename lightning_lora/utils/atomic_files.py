"""Writing files so that a crash at any moment leaves the old one or the new one, whole.

The new content is staged beside the target (a rename is atomic only within one filesystem, and ``$TMPDIR`` is often
another), synced to disk, renamed over the target, and the folder synced so that the rename itself survives.

A writer that is killed cannot remove its staging file. The next writer of the same target does, once nothing has been written to
it for an hour by the filesystem's own clock: neither a process number nor this machine's clock says anything about a writer on
another machine, and locks are not to be had everywhere.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

ABANDONED = 3600.0  # seconds since the last write after which a staging file's writer is taken for dead


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
            _remove_abandoned(path, os.fstat(handle).st_mtime)
            file.write(write) if isinstance(write, bytes) else write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(staged, 0o666 & ~_umask())  # mkstemp makes private files; this one is to be shared like any other
        os.replace(staged, path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _remove_abandoned(path: Path, now: float) -> None:
    """Remove the staging files of writers of this target that were killed; of no other target's, and none that is being written."""
    staged = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")  # as mkstemp makes them
    for name in filter(staged.fullmatch, os.listdir(path.parent)):
        with suppress(OSError):  # another writer renamed or removed it first, or it is another user's: no reason not to save
            if now - (path.parent / name).stat().st_mtime > ABANDONED:
                (path.parent / name).unlink()


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
