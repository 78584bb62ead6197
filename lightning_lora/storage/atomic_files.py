"""Write files atomically: after a crash at any moment the target holds either the old content or the new, complete.

The new content is written to a staging file beside the target. A rename is atomic only within one filesystem, and ``$TMPDIR`` is
often on another. The staging file is synced to disk and renamed over the target. The folder is then synced, so that the rename is durable.

A writer that is killed cannot remove its staging file. The next writer of the same target removes it. A writer locks its staging file,
and the lock ends with the writer. Where the filesystem has no locks, the next writer removes a file to which nothing has been written for
an hour by the filesystem's own clock. A process number or this machine's clock says nothing about a writer on another machine.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from lightning_lora.storage.file_locks import try_lock

ABANDONED = 3600.0  # seconds since the last write, after which a writer counts as dead where there are no locks


def write_atomic(path: str | Path, write: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file in one step.

    Args:
        path: the target; its folder must exist.
        write: the content, or a function that writes the content to the open staging file.

    Raises:
        OSError: the disk is full or the folder is read-only. The old file is intact and the staging file is removed.
    """
    path = Path(path)
    handle, staged = _stage(path)
    try:
        with os.fdopen(handle, "wb") as file:
            _remove_abandoned(path, os.fstat(handle).st_mtime)
            file.write(write) if isinstance(write, bytes) else _call(write, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(staged, 0o666 & ~_umask())  # mkstemp creates private files; this one gets the usual permissions
        os.replace(staged, path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_files(folder: Path) -> None:
    """Wait until all files in a folder, and in the folders in it, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)


def hidden(error: BaseException) -> OSError | None:
    """Return the OSError that torch.save hides: on a full disk its writer raises a RuntimeError about a position in the file."""
    return error.__context__ if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError) else None


def _call(write: Callable[[BinaryIO], object], file: BinaryIO) -> None:
    try:
        write(file)
    except RuntimeError as error:
        full = hidden(error)
        if full is None:
            raise
        raise full from None


def _stage(path: Path) -> tuple[int, str]:
    """Make a locked staging file. Return its handle and its name."""
    while True:
        handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        if try_lock(handle) is not False and os.path.lexists(staged):
            return handle, staged
        os.close(handle)  # another writer found it before it was locked, and removes it


def _remove_abandoned(path: Path, now: float) -> None:
    """Remove the staging files that killed writers of this target left. Keep those of other targets and those still being written."""
    staged = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")  # the form of mkstemp's names
    for name in filter(staged.fullmatch, os.listdir(path.parent)):
        with suppress(OSError):  # another writer renamed or removed it, or another user owns it: save anyway
            handle = os.open(path.parent / name, os.O_RDWR)
            try:
                dead = try_lock(handle)
                if dead:  # removed under the lock, or its writer could take it meanwhile
                    (path.parent / name).unlink()
            finally:
                os.close(handle)
            if dead is None and now - (path.parent / name).stat().st_mtime > ABANDONED:
                (path.parent / name).unlink()


def sync_folder(folder: str | Path) -> None:
    """Make renames and removals in a folder durable."""
    if os.name == "nt":  # Windows has no folder handles; its renames are journaled
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
