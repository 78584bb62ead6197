import errno
import os

import pytest

from lightning_lora.storage import folders
from lightning_lora.storage.folders import REMOVED, aside, exchange, put_back, remove, standing, swap

pytestmark = pytest.mark.skipif(os.name == "nt", reason="renames there are another matter")


def make(path, text):
    """A file, or a folder with a file in it."""
    if path.name.endswith("folder"):
        path.mkdir()
        (path / "file").write_text(text)
    else:
        path.write_text(text)
    return path


def text_of(path):
    return (path / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("old", ["a folder", "a file", None])
@pytest.mark.parametrize("new", ["new folder", "new file"])
def test_whatever_was_there_is_replaced(tmp_path, monkeypatch, exchanges, old, new):
    if not exchanges:
        monkeypatch.setattr(folders, "exchange", lambda *args: False)
    staged, target = make(tmp_path / new, "new"), tmp_path / "target"
    if old is not None:
        make(tmp_path / old, "old").rename(target)
    swap(staged, target)
    assert text_of(target) == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    pointed, target = make(tmp_path / "pointed folder", "pointed"), tmp_path / "target"
    target.symlink_to(pointed)
    swap(make(tmp_path / "new folder", "new"), target)
    assert not target.is_symlink() and text_of(target) == "new"
    assert text_of(pointed) == "pointed"
    target.rename(tmp_path / "first")
    target.symlink_to(pointed)
    remove(target)
    assert sorted(os.listdir(tmp_path)) == ["first", "pointed folder"] and text_of(pointed) == "pointed"


def test_an_exchange_is_one_step_or_nothing(tmp_path):
    first, second = make(tmp_path / "first folder", "first"), make(tmp_path / "second folder", "second")
    if exchange(first, second):
        assert text_of(first) == "second" and text_of(second) == "first"
    assert not exchange(first, tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["first folder", "second folder"]


def test_a_second_rename_that_fails_is_undone(tmp_path, monkeypatch):
    staged, target = make(tmp_path / "new folder", "new"), make(tmp_path / "old folder", "old")
    real = os.replace

    def fails(source, place):
        if source == staged:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, place)

    monkeypatch.setattr(folders, "exchange", lambda *args: False)
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Input/output"):
        swap(staged, target)
    assert text_of(target) == "old" and text_of(staged) == "new" and not aside(target).exists()


def test_what_was_put_aside_is_found_and_put_back(tmp_path):
    path = tmp_path / "last.ckpt"
    assert standing(path) == path
    make(tmp_path / "a folder", "old").rename(aside(path))
    assert standing(path) == aside(path)
    put_back(path)
    assert standing(path) == path and text_of(path) == "old"
    put_back(path)
    make(aside(path), "older")
    assert standing(path) == path


@pytest.mark.parametrize("name", ["a folder", "a file"])
def test_nothing_of_what_is_removed_comes_back(tmp_path, name):
    path = make(tmp_path / name, "text")
    make(aside(path), "older")
    left = make(tmp_path / "left folder", "of a killed process").rename(tmp_path / f".other.ckpt{REMOVED}")
    keep = make(tmp_path / "user's file", "kept")
    remove(path)
    assert not left.exists() and os.listdir(tmp_path) == [keep.name]
    assert standing(path) == path
    remove(path)  # nothing is there


def test_a_removed_folder_is_never_there_in_part(tmp_path, monkeypatch):
    path = make(tmp_path / "a folder", "text")
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)
    remove(path)
    assert not path.exists()
