import errno
import os

import pytest

from lightning_lora.storage import room
from lightning_lora.storage.room import check_room


def test_a_folder_with_room_is_left_as_it_was(tmp_path):
    check_room(tmp_path, 10**6, "dirpath")
    check_room(tmp_path / "not" / "there", 0, "dirpath")
    assert os.listdir(tmp_path) == []


def test_more_than_the_disk_has(tmp_path, monkeypatch):
    """It is not tried: the disk would be full for others meanwhile."""
    monkeypatch.setattr(os, "posix_fallocate", None)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(ValueError, match=r"dirpath='.*new' has no room for [\d,.]+ MB, .* \([\d,.]+ MB are free"):
        check_room(tmp_path / "new", free * 2 + 10**9, "dirpath")
    assert os.listdir(tmp_path) == []


def test_a_system_that_cannot_allocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    check_room(tmp_path, 10**6, "dirpath")


def test_a_quota_counts_though_the_disk_has_room(tmp_path, monkeypatch):
    def over(*args):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", over)
    with pytest.raises(ValueError, match="no room"):
        check_room(tmp_path, 10**6, "dirpath")


def test_a_filesystem_that_cannot_allocate_goes_by_the_free_space(tmp_path, monkeypatch):
    def cannot(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    check_room(tmp_path, 10**6, "dirpath")
    with pytest.raises(ValueError, match="has no room"):
        check_room(tmp_path, 10**18, "dirpath")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(room.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=rf"out='.*' cannot be written to: .*{os.strerror(number)}. Choose another"):
        check_room(tmp_path, 1, "out")


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ValueError, match="file is no folder; choose another"):
            check_room(folder, 1, "dirpath")
