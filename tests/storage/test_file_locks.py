import errno
import os
import signal
import threading

import pytest

from lightning_lora.storage import file_locks
from lightning_lora.storage.file_locks import exclusive, lock_file
from tests.processes import SERVER, start

fcntl = pytest.importorskip("fcntl")


def test_one_owner_at_a_time(tmp_path):
    """Those who wait find the file gone, whose lock they then have; none of them is let in beside another."""
    file, inside, most, turns = lock_file(tmp_path / "target"), [], [], []

    def work():
        for _ in range(20):
            with exclusive(file) as held:
                assert held
                inside.append(1)
                most.append(len(inside))
                turns.append(threading.get_ident())
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(turns) == 80 and set(most) == {1}
    assert os.listdir(tmp_path) == []


def hold(file, held):
    with exclusive(file):
        held.set()
        signal.pause()


def test_a_lock_ends_with_its_owner_and_is_waited_for_till_then(tmp_path, monkeypatch):
    file = lock_file(tmp_path / "target")
    held = SERVER.Event()
    owner = start(hold, file, held)
    try:
        assert held.wait(120.0)
        monkeypatch.setattr(file_locks, "LONGEST", 0.0)
        with pytest.raises(RuntimeError, match=r"another process holds .*\.target\.lock since 0 s: stop it"), exclusive(file):
            pass
    finally:
        owner.kill()
        owner.join()
    assert file.exists()
    with exclusive(file) as held:
        assert held
    assert not file.exists()


def test_a_filesystem_without_locks(tmp_path, monkeypatch):
    def cannot(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", cannot)
    with exclusive(tmp_path / ".x.lock") as held:
        assert not held
    assert os.listdir(tmp_path) == []


def test_a_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(file_locks, "fcntl", None)
    with exclusive(tmp_path / ".x.lock") as held:
        assert not held


def test_another_users_lock_file(tmp_path, monkeypatch):
    def forbidden(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", forbidden)
    with exclusive(tmp_path / ".x.lock") as held:
        assert not held


def test_an_error_inside_frees_it(tmp_path):
    file = lock_file(tmp_path / "target")
    with pytest.raises(KeyError), exclusive(file):
        raise KeyError
    with exclusive(file) as held:
        assert held
