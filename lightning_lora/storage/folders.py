"""Replace and remove folders: after a kill at any moment the old folder or the new one can be found, and it is whole.

A staged folder takes its target's place in one step where the system can exchange two names: on Linux, on most local filesystems. Elsewhere
it takes two renames. After a kill between them the old folder is beside the target, under its ``.old`` name: :func:`standing` finds it
there, and the next writer puts it back.

A folder is removed by giving it a hidden name first. So none is there in part under its own name.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

from lightning_lora.storage.atomic_files import sync_folder

REMOVED = ".lightning_lora.removed"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux, see renameat2(2)


def aside(path: Path) -> Path:
    """Return where the old file or folder is while the new one takes its place."""
    return path.with_name(f".{path.name}.old")


def standing(path: Path) -> Path:
    """Return the path. After a kill between two renames, return the ``.old`` path that the old file or folder was moved to."""
    return aside(path) if not os.path.lexists(path) and os.path.lexists(aside(path)) else path


def put_back(path: Path) -> None:
    """Undo what a kill between two renames has left."""
    if standing(path) != path:
        os.replace(aside(path), path)


def take_place(staged: Path, target: Path) -> Path:
    """Put a staged file or folder in the target's place, durably. Both must be in one folder.

    Returns:
        Where the old one is now, to be removed by :func:`erase`. Nothing is there if there was no old one.
    """
    old = aside(target)
    if os.path.lexists(target):
        if exchange(staged, target):
            old = staged
        else:
            erase(old)
            try:
                os.replace(target, old)
                os.replace(staged, target)
            except BaseException:  # an interrupt too
                put_back(target)
                raise
    else:
        os.replace(staged, target)
    sync_folder(target.parent)
    return old


def swap(staged: Path, target: Path) -> None:
    """Put a staged file or folder in the target's place, and remove the old one."""
    erase(take_place(staged, target))
    erase(aside(target))


def remove(path: Path) -> None:
    """Remove a file or a folder, and what stands under its ``.old`` name. A kill leaves it whole, or without its name."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name}{REMOVED}")
        erase(hidden)
        os.replace(path, hidden)
        sync_folder(path.parent)
    else:
        path.unlink(missing_ok=True)
    erase(aside(path))
    for left in path.parent.glob(f".*{REMOVED}"):  # this one, and those of killed processes
        erase(left)


def erase(path: Path) -> None:
    """Remove a file or a folder that nobody looks for. What cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step. Return False, with nothing changed, where the system or the filesystem cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0
