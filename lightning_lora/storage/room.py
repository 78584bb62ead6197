"""Check that a folder can be written to and has room, before the work whose result goes there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_room(folder: str | Path, size: int, name: str, what: str = "one checkpoint of this run takes at least") -> None:
    """Raise unless a file of this size can be written into a folder. Nothing is left there.

    The space is really allocated where the system can do so, because a quota does not show in the free space.

    Args:
        folder: it need not exist yet.
        size: in bytes.
        name: how the user set the folder, for messages, such as ``dirpath``.
        what: what has this size, for messages.

    Raises:
        ValueError: the folder cannot be written to, or lacks the room.
    """
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{name}={str(folder)!r}: {there} is no folder; choose another.")
    free = shutil.disk_usage(there).free
    short = size > free
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            if not short:  # else the attempt would fill the disk for a moment
                _allocate(file.fileno(), size)
            file.write(b"\0")
            file.flush()
    except OSError as error:
        if error.errno not in _FULL:
            raise ValueError(f"{name}={str(folder)!r} cannot be written to: {error}. Choose another, or give it to this user.") from error
        short = True
    if short:
        raise ValueError(
            f"{name}={str(folder)!r} has no room for {size / 1e6:,.1f} MB, as much as {what}"
            f" ({free / 1e6:,.1f} MB are free, apart from quotas). Make room, or choose another folder."
        )


def _allocate(handle: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, max(size, 1))
    except OSError as error:
        if error.errno in _FULL:
            raise
        # else the filesystem cannot, and only the free space is compared
