"""Write several files into a folder as one commit: a kill, a full disk or a second writer leaves all old files or all new ones.

The files are staged in a new folder, with hard links to the other files of the old folder. The new folder then takes the old one's place
(:mod:`lightning_lora.storage.folders`), one writer at a time.

Some folders cannot be replaced: a mount point, the working directory, a folder of another user, one with folders in it, one whose parent is
not writable. There the staged files are moved in one by one. The last one, without which nobody reads the others, is moved away before
that, and is put in last.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from lightning_lora.storage.atomic_files import ABANDONED, sync_folder
from lightning_lora.storage.file_locks import exclusive
from lightning_lora.storage.folders import aside, erase, put_back, standing, take_place

T = TypeVar("T")
ATTEMPTS = 100


@contextmanager
def commit(folder: Path, last: str, check: Callable[[], object], drops: Callable[[str], object] = lambda name: False) -> Iterator[Path]:
    """Yield a new folder to write files into. At the end they are in ``folder``, all at once; after an error it is unchanged.

    Args:
        folder: created if it does not exist. Its other files stay.
        last: name of the file that is read first, and found last.
        check: raises if the folder must not be written to. It is called once no other writer is at work.
        drops: tells of the name of another file whether it does not stay.

    Raises:
        OSError: the disk is full, the folder cannot be written to, or it has a folder where a file is to be.
        RuntimeError: another process has been writing to it for ten minutes.
    """
    folder = Path(os.path.realpath(folder))
    made = [path for path in folder.parents if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        home = _home(folder)
        with exclusive(home / f".{folder.name}.lock") as alone:
            put_back(folder)
            check()
            with _staging(folder, home, alone) as staged:
                yield staged
                names = sorted(os.listdir(staged), key=lambda name: (name == last, name))
                if blocked := [folder / name for name in names if (folder / name).is_dir() and not (folder / name).is_symlink()]:
                    raise IsADirectoryError(errno.EISDIR, "is a folder, where a file is to be written", str(blocked[0]))
                hidden = aside(folder / names[-1]).name  # of an earlier commit that was killed
                gone = {name for name in _names(folder) if name in names or name == hidden or drops(name)}
                linked = _link_others(folder, staged, gone) if home != folder else None
                if linked is None:
                    _move_in(staged, folder, names, gone.difference(names, [hidden]))
                else:
                    sync_folder(staged)
                    old = take_place(staged, folder)
                    _bring_late(old, folder, gone, linked)
                    erase(old)
    except BaseException:
        for path in made:
            with suppress(OSError):  # another process has put something there
                path.rmdir()
        raise


def occupied(folder: Path) -> bool:
    """Return whether a folder has anything in it but what a writer stages."""
    folder = Path(os.path.realpath(folder))
    return folder.is_dir() and any(not _is_ours(name, folder) for name in os.listdir(folder))


def read_undisturbed(folder: Path, names: Sequence[str], read: Callable[[Path], T]) -> T:
    """Return what ``read`` returns for a folder, from one commit. Read again if another commit was made meanwhile.

    Args:
        folder: the folder. ``read`` gets its present path.
        names: names of the files in it.
        read: reads the files. What it raises is raised, if no other commit was made meanwhile.

    Raises:
        ValueError: another commit was made during every attempt.
    """
    for _ in range(ATTEMPTS):
        before, real = _stamps(folder, names), Path(os.path.realpath(folder))
        try:
            content = read(folder if standing(real) == real else standing(real))
        except (ValueError, OSError):
            if _stamps(folder, names) == before:
                raise
            continue
        if _stamps(folder, names) == before:
            return content
    raise ValueError(f"{folder} was written to during each of {ATTEMPTS} attempts to read it; stop the other process.")


def _stamps(folder: Path, names: Sequence[str]) -> list[tuple[int, ...] | None]:
    """Return what changes when a file is replaced."""
    stamps: list[tuple[int, ...] | None] = []
    for path in (folder, *(folder / name for name in names)):
        try:
            stat = path.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((stat.st_dev, stat.st_ino, *((stat.st_mtime_ns, stat.st_size) if path != folder else ())))
    return stamps


def _home(folder: Path) -> Path:
    """Return the folder to stage in: the parent, or the folder itself if nothing can be renamed from the parent."""
    if not folder.is_dir():
        return folder.parent
    mounted = os.path.ismount(folder) or folder.stat().st_dev != folder.parent.stat().st_dev
    return folder if mounted or not os.access(folder.parent, os.W_OK) else folder.parent


def _is_working_directory(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # the working directory was deleted
        return False


@contextmanager
def _staging(folder: Path, home: Path, alone: bool) -> Iterator[Path]:
    """Yield a new folder beside or in the target, and remove what is left of it. Remove those of killed writers first."""
    staged = home / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    staged.mkdir()
    try:
        now = staged.stat().st_mtime  # by the filesystem's own clock
        for name in filter(re.compile(_staged(folder)).fullmatch, os.listdir(home)):
            with suppress(OSError):
                if name != staged.name and (alone or now - (home / name).stat().st_mtime > ABANDONED):
                    erase(home / name)
        yield staged
    finally:
        erase(staged)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _link_others(folder: Path, staged: Path, gone: set[str]) -> dict[str, int] | None:
    """Link the folder's files into the staged one, but for those that go. Return name → inode; None if the folder has to stay.

    The staged folder gets the folder's owner, group and permissions.
    """
    if not folder.is_dir():
        return {}
    mine, new, linked = folder.stat(), staged.stat(), {}
    if (mine.st_uid, mine.st_gid) != (new.st_uid, new.st_gid) or _is_working_directory(folder):
        return None
    for entry in _entries(folder):
        if not entry.is_symlink() and not entry.is_file():
            return None
        if entry.name in gone:
            continue
        try:
            os.link(entry.path, staged / entry.name, follow_symlinks=False)
        except FileNotFoundError:  # it was removed meanwhile
            continue
        except OSError:  # a filesystem without links, or a file of another user
            return None
        linked[entry.name] = entry.inode()
    shutil.copystat(folder, staged)
    return linked


def _bring_late(old: Path, folder: Path, gone: set[str], linked: dict[str, int]) -> None:
    """Move what others put into the old folder after its files were linked."""
    for entry in _entries(old) if old.is_dir() else ():
        if entry.name not in gone and linked.get(entry.name) != entry.inode():
            os.replace(entry.path, folder / entry.name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _move_in(staged: Path, folder: Path, names: Sequence[str], outdated: Set[str]) -> None:
    """Move the staged files into the folder one by one, and remove the outdated ones before the last is moved in.

    One other file takes its place in one step. If there are more, nobody must read them in between, even if the last stays as it is.
    """
    last = folder / names[-1]
    there, old = last.is_file(), aside(last)

    def bring(sync: Callable[[Path], object]) -> None:
        for name in [name for name in names if (staged / name).exists()]:
            if name == names[-1]:
                for other in outdated:
                    erase(folder / other)
            os.replace(staged / name, folder / name)
            sync(folder)

    try:
        if there and (len(names) > 2 or outdated or last.read_bytes() != (staged / names[-1]).read_bytes()):
            os.replace(last, old)
            sync_folder(folder)
        bring(sync_folder)
    except BaseException:  # an interrupt too
        if not all((staged / name).exists() for name in names):  # the old files are no longer all there, so the new ones have to be
            bring(lambda folder: None)
            erase(old)
        elif there:
            put_back(last)
        raise
    erase(old)


def _is_ours(name: str, folder: Path) -> bool:
    return re.fullmatch(rf"{_staged(folder)}|\.{re.escape(folder.name)}\.lock", name) is not None


def _staged(folder: Path) -> str:
    return rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.tmp"
