"""A file is the old one or the new one, whole, whatever fails; nothing is left lying about."""

import errno
import os
import signal
import stat
import tempfile
import time

import pytest
import torch

from lightning_lora.storage import file_locks
from lightning_lora.storage.atomic_files import ABANDONED, sync_folder, write_atomic
from lightning_lora.storage.file_locks import try_lock
from tests.faults.kit import row
from tests.processes import ended, start


@pytest.mark.parametrize("content", [b"new", lambda file: file.write(b"new")], ids=["bytes", "function"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_writes_and_replaces(tmp_path, content, old):
    target = tmp_path / "file"
    if old is not None:
        target.write_bytes(old)
    write_atomic(str(target), content)
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(file):
    file.write(b"half")
    file.flush()
    full_disk()


@pytest.mark.parametrize("step", ["write", "fsync", "chmod", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, step):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    if step != "write":
        monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError) as error:
        write_atomic(target, half_written if step == "write" else b"new")
    assert error.value.errno == errno.ENOSPC
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_behind_torchs_writer(tmp_path):
    """It raises a RuntimeError about a position in the file."""

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if self.file.tell() > 500:
                full_disk()
            return self.file.write(data)

        def flush(self): ...

    with pytest.raises(OSError) as error:
        write_atomic(tmp_path / "file", lambda file: torch.save({"x": torch.ones(1000)}, Full(file)))
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="its own"):
        write_atomic(tmp_path / "file", lambda file: (_ for _ in ()).throw(RuntimeError("its own")))
    assert os.listdir(tmp_path) == []


def test_an_interrupt_is_cleaned_up_too(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", interrupted)
    assert os.listdir(tmp_path) == []


def leftover(folder, name, age):
    """A staging file that was last written to so many seconds ago."""
    file = folder / name
    file.write_bytes(b"half")
    os.utime(file, (time.time() - age,) * 2)
    return name


@pytest.mark.parametrize("locks", [True, False])
def test_what_killed_writers_of_the_target_left_is_removed(tmp_path, monkeypatch, locks):
    """At once where a lock says that its writer is dead; else after an hour."""
    if not locks:
        monkeypatch.setattr(file_locks, "fcntl", None)
    target = tmp_path / "a+b.ckpt"
    for name in (".a+b.ckpt.abcd_123.tmp", ".a+b.ckpt.zzzzzzzz.tmp"):
        leftover(tmp_path, name, 0 if locks else ABANDONED + 60)
    others = (".a+b.abcd_123.tmp", ".a+b.ckpt.old.abcd_123.tmp", ".aab.ckpt.abcd_123.tmp")  # other targets'
    users = ("a+b.ckpt.abcd_123.tmp", ".a+b.ckpt.tmp", ".a+b.ckpt.mine.tmp")
    kept = {leftover(tmp_path, name, 10 * ABANDONED) for name in (*others, *users)}
    if not locks:
        kept.add(leftover(tmp_path, ".a+b.ckpt.living12.tmp", ABANDONED - 60))  # its writer may be alive
    write_atomic(target, b"new")
    assert set(os.listdir(tmp_path)) == {*kept, "a+b.ckpt"}


def test_a_staging_file_that_is_being_written_is_kept(tmp_path):
    """However long its writer takes: here another writer of the same target comes in between, an hour later."""
    target = tmp_path / "file"

    def slow(file):
        file.write(b"slow")
        os.utime(file.fileno(), (time.time() - 10 * ABANDONED,) * 2)
        write_atomic(target, b"fast")
        assert target.read_bytes() == b"fast"

    write_atomic(target, slow)
    assert target.read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("removes", ["first", "in between"])
def test_a_staging_file_that_another_writer_takes_for_abandoned(tmp_path, monkeypatch, removes):
    """Between its making and its lock: the writer makes another one."""
    real, taken = tempfile.mkstemp, []

    def mkstemp(**kwargs):
        handle, staged = real(**kwargs)
        if not taken:
            taken.append(os.open(staged, os.O_RDWR))
            assert try_lock(taken[0])
            if removes == "first":
                os.unlink(staged)
                os.close(taken[0])
        return handle, staged

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    if removes == "in between":
        assert len(os.listdir(tmp_path)) == 2  # the other writer has still to remove it
        os.close(taken[0])


def test_the_age_is_by_the_filesystems_clock(tmp_path, monkeypatch):
    """Which may be another machine's. It counts where there are no locks."""
    monkeypatch.setattr(file_locks, "fcntl", None)
    name = leftover(tmp_path, ".file.abcd_123.tmp", 60)
    monkeypatch.setattr(time, "time", lambda: 1e11)
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / name).exists()


def test_a_leftover_that_cannot_be_removed_is_no_reason_not_to_save(tmp_path, monkeypatch):
    name = leftover(tmp_path, ".file.abcd_123.tmp", ABANDONED + 60)

    def forbidden(path, **kwargs):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", forbidden)
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / name).exists()


def is_killed(target):
    def write(file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    write_atomic(target, write)


@row(33)
def test_a_killed_writers_staging_file_is_found(tmp_path):
    """That the names are as the search has them."""
    target = tmp_path / "file"
    assert ended(start(is_killed, target)) == -signal.SIGKILL
    assert os.listdir(tmp_path) not in ([], ["file"])
    write_atomic(target, b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_the_order_is_content_sync_rename_folder_sync(tmp_path, monkeypatch):
    """What makes it safe against a power cut: the content is on disk before the name, and then the name too."""
    steps = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(handle):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        steps.append("sync folder" if folder else f"sync {os.fstat(handle).st_size} bytes")
        real["fsync"](handle)

    def replace(staged, target):
        assert os.path.dirname(staged) == os.path.dirname(target) == str(tmp_path)  # the same filesystem
        steps.append("rename")
        real["replace"](staged, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "file", b"new")
    assert steps == ["sync 3 bytes", "rename", "sync folder"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", b"new")
        (tmp_path / "plain").write_bytes(b"")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "file", b"new")


def test_sync_folder_closes_its_handle(tmp_path, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *args: opened.append(real(*args)) or opened[-1])
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        sync_folder(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
