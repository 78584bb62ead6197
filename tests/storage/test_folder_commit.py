"""Two files and the user's others, under failures, other writers and readers. Kills: tests/harness."""

import errno
import os
import threading
import time
from functools import partial

import pytest

from lightning_lora.storage import folder_commit
from lightning_lora.storage.atomic_files import ABANDONED
from lightning_lora.storage.folder_commit import commit, occupied, read_undisturbed

NAMES = ("tensors", "config")


def write(folder, text, check=lambda: None):
    with commit(folder, NAMES[-1], check) as staged:
        for name in NAMES:
            (staged / name).write_text(f"{name} {text}")


def read(folder):
    """The version of the two files, which must be one."""
    (text,) = {(folder / name).read_text().removeprefix(f"{name} ") for name in NAMES}
    return text


def contents(folder):
    return {path.name: path.read_text() if path.is_file() else None for path in folder.iterdir()}


WAYS = {
    "replaced": lambda folder, patch: None,
    "holds a folder": lambda folder, patch: (folder / "sub").mkdir(),
    "working directory": lambda folder, patch: patch.chdir(folder),
    "no links": lambda folder, patch: patch.setattr(os, "link", refuse),
    "mount point": lambda folder, patch: patch.setattr(os.path, "ismount", lambda path: path == folder),
    "parent not writable": lambda folder, patch: patch.setattr(os, "access", lambda path, mode: path != folder.parent),
}


def refuse(*args, **kwargs):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(params=WAYS)
def folder(request, tmp_path, monkeypatch):
    """A folder with both files and others, in all conditions that decide how it is written to."""
    folder = tmp_path / "adapter"
    write(folder, "old")
    (folder / "README.md").write_text("mine")
    (folder / "link").symlink_to("README.md")
    WAYS[request.param](folder, monkeypatch)
    return folder


def test_both_files_are_replaced_and_the_others_stay(folder):
    before = contents(folder)
    inode = (folder / "README.md").stat().st_ino
    write(folder, "new")
    assert read(folder) == "new"
    assert contents(folder) == before | {name: f"{name} new" for name in NAMES}
    assert (folder / "link").is_symlink() and (folder / "README.md").stat().st_ino == inode
    assert os.listdir(folder.parent) == ["adapter"]


def test_a_failure_while_writing_leaves_all_as_it_was(folder):
    before = contents(folder)
    with pytest.raises(OSError, match="No space"), commit(folder, NAMES[-1], lambda: None) as staged:
        (staged / "tensors").write_text("half")
        full()
    assert contents(folder) == before and os.listdir(folder.parent) == ["adapter"]


@pytest.mark.parametrize("call", ["mkdir", "open", "replace"])
def test_a_full_disk_leaves_all_as_it_was(folder, monkeypatch, call):
    before = contents(folder)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(folder_commit, "take_place", full)
        patch.setattr(os, call, full)
        write(folder, "new")
    assert contents(folder) == before and os.listdir(folder.parent) == ["adapter"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_a_files_place_stays(tmp_path, name):
    folder = tmp_path / "adapter"
    (folder / name / "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=rf"is a folder, where a file is to be written: '.*/{name}'"):
        write(folder, "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["adapter", name, "inside"])


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()])
def test_several_files_are_never_mixed_where_a_folder_stays(tmp_path, monkeypatch, stop):
    """Whoever finds the last file finds all of one version, between any two calls, and after one of them failed."""
    folder, versions = tmp_path / "model", {"old": ("part1", "part2", "config"), "new": ("part1", "part3", "config")}
    (folder / "sub").mkdir(parents=True)

    def write(version):
        with commit(folder, "config", lambda: None, lambda name: name.startswith("part")) as staged:
            for name in versions[version]:
                (staged / name).write_text("the same" if name == "config" else version)

    def version():
        files = {name: text for name, text in contents(folder).items() if text is not None and name[0] != "."}
        if "config" in files:
            (found,) = [v for v, names in versions.items() if files == {n: "the same" if n == "config" else v for n in names}]
            return found
        return None

    calls = {"replace": os.replace, "unlink": os.unlink}
    for stop_at in range(99):
        write("old")
        seen = []

        def watched(*args, call, stop_at=stop_at, seen=seen, **kwargs):
            seen.append(version())
            if len(seen) - 1 == stop_at:
                raise stop
            return calls[call](*args, **kwargs)

        with monkeypatch.context() as patch:
            for call in calls:
                patch.setattr(os, call, partial(watched, call=call))
            try:
                write("new")
            except type(stop):
                assert version() in versions
                continue
        assert version() == "new" and {"old", None} <= set(seen)
        break
    assert 4 < stop_at < 20


def test_the_check_is_made_when_no_other_writer_is_at_work(folder):
    def check():
        assert not occupied(folder) or sorted(contents(folder).keys() & set(NAMES)) == sorted(NAMES)
        raise ValueError("not empty")

    before = contents(folder)
    with pytest.raises(ValueError, match="not empty"):
        write(folder, "new", check)
    assert contents(folder) == before


def test_the_working_directory_and_who_is_in_it_stay(tmp_path, monkeypatch):
    write(tmp_path / "adapter", "old")
    monkeypatch.chdir(tmp_path / "adapter")
    write(folder_commit.Path("."), "new")
    assert os.path.samefile(os.getcwd(), tmp_path / "adapter") and read(tmp_path / "adapter") == "new"


def test_permissions_stay_and_a_link_is_followed(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    write(link, "old")
    real.chmod(0o750)
    write(link, "new")
    assert link.is_symlink() and read(real) == "new" and real.stat().st_mode & 0o777 == 0o750


def test_a_first_save_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(OSError, match="No space"), commit(tmp_path / "a" / "b" / "adapter", NAMES[-1], lambda: None):
        full()
    assert os.listdir(tmp_path) == []


def test_files_that_come_while_it_is_written_are_kept(tmp_path):
    folder = tmp_path / "adapter"
    write(folder, "old")
    (folder / "README.md").write_text("first")
    with commit(folder, NAMES[-1], lambda: None) as staged:
        for name in NAMES:
            (staged / name).write_text(f"{name} new")
        (folder / "tokenizer.json").write_text("late")
        (folder / "README.new").write_text("second")
        (folder / "README.new").rename(folder / "README.md")
    assert read(folder) == "new"
    assert {name: text for name, text in contents(folder).items() if name not in NAMES} == {"tokenizer.json": "late", "README.md": "second"}


def test_leftovers_of_killed_writers_go_those_of_others_stay(tmp_path):
    folder, names = tmp_path / "adapter", [".adapter.0123abcd.tmp", ".adapter2.0123abcd.tmp", ".adapter.mine.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    write(folder, "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "adapter"])


def test_without_locks_leftovers_go_by_their_age(tmp_path, monkeypatch):
    from lightning_lora.storage import file_locks

    monkeypatch.setattr(file_locks, "fcntl", None)
    for name, age in ((".adapter.00000000.tmp", 0), (".adapter.11111111.tmp", ABANDONED + 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write(tmp_path / "adapter", "new")
    assert sorted(os.listdir(tmp_path)) == [".adapter.00000000.tmp", "adapter"]


def test_occupied_is_by_what_others_put_there(tmp_path):
    folder = tmp_path / "adapter"
    assert not occupied(folder)
    folder.mkdir()
    (folder / ".adapter.lock").touch()
    (folder / ".adapter.0123abcd.tmp").mkdir()
    assert not occupied(folder)
    (folder / ".hidden").touch()
    assert occupied(folder)


def test_writers_and_readers_at_once_see_whole_commits(tmp_path):
    folder, seen, stop = tmp_path / "adapter", set(), threading.Event()
    write(folder, "start")

    def reader():
        while not stop.is_set():
            seen.add(read_undisturbed(folder, NAMES, read))

    def writer(name):
        for turn in range(15):
            write(folder, f"{name}{turn}")

    threads = [threading.Thread(target=writer, args=(name,)) for name in "ab"]
    watcher = threading.Thread(target=reader)
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert len(seen) > 1 and read(folder) in {"a14", "b14"}
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_reader_that_is_always_disturbed_gives_up(tmp_path):
    folder, turns = tmp_path / "adapter", []
    write(folder, "start")

    def disturbed(path):
        turns.append(path)
        (folder / "new").write_text("x" * len(turns))
        (folder / "new").rename(folder / "config")
        raise ValueError("of two saves")

    with pytest.raises(ValueError, match="was written to during each of 100 attempts"):
        read_undisturbed(folder, NAMES, disturbed)
    assert len(turns) == 100


def test_a_reader_gets_its_own_error_where_nothing_changed(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_undisturbed(tmp_path / "none", NAMES, read)
