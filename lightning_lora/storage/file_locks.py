"""Locks between processes. A lock ends with its owner: a killed process holds none, and a stale lock file has no effect.

The lock is ``flock`` on an open file. :func:`exclusive` takes it on a hidden file beside the path. The owner removes that file at the end.
Whoever waited for it then holds the lock of a file without a name, and opens the new one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LONGEST = 600.0  # seconds to wait for another owner
PAUSE = 0.02  # seconds between two attempts


def lock_file(path: Path) -> Path:
    """Return the file whose lock stands for a path."""
    return path.with_name(f".{path.name}.lock")


def try_lock(handle: int) -> bool | None:
    """Lock an open file until it is closed, without waiting for another owner.

    Returns:
        True if it is locked now; False if another process has the lock; None on a system or filesystem without such locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # NFS, Lustre and FUSE may have none
        return None
    return True


@contextmanager
def exclusive(file: Path) -> Iterator[bool]:
    """Wait for a lock, and hold it while the ``with`` block runs.

    Args:
        file: the lock file, from :func:`lock_file`; its folder must exist.

    Yields:
        True; False on a system or filesystem without such locks, where nothing is held.

    Raises:
        RuntimeError: another process held the lock for ten minutes.
    """
    handle = _acquire(file)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        try:
            with suppress(OSError):  # a file that stays does no harm
                os.unlink(file)
        finally:
            os.close(handle)


def remove_unheld(file: Path) -> None:
    """Remove a lock file that a killed process has left. One that a process holds stays, and so does one on a system without locks."""
    with suppress(OSError):
        handle = os.open(file, os.O_RDWR)
        try:
            if try_lock(handle):
                os.unlink(file)
        finally:
            os.close(handle)


def _acquire(file: Path) -> int | None:
    """Return the handle that holds the lock; None where there are no locks."""
    end = time.monotonic() + LONGEST
    while fcntl is not None:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's, whose process was killed
            return None
        held = try_lock(handle)
        with suppress(FileNotFoundError):
            if held and os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        os.close(handle)
        if held is None:
            with suppress(FileNotFoundError):
                os.unlink(file)
            return None
        if held:  # its owner has removed the file meanwhile
            continue
        if time.monotonic() > end:
            raise RuntimeError(f"another process holds {file} since {LONGEST:.0f} s: stop it, or choose another folder.")
        time.sleep(PAUSE)
    return None
