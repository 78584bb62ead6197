"""Files of strangers that are no files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.storage.regular_files import open_regular, read_regular


def test_a_file_is_read_through_a_link_too(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("x")
    assert read_regular(tmp_path / "x", 3) == read_regular(tmp_path / "link", 3) == b"abc"
    with open_regular(tmp_path / "x") as stream:
        assert stream.read(2) == b"ab"


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    os.truncate(tmp_path / "x", 2**40)  # all holes
    with pytest.raises(ValueError, match=r"x has more than 1,000 bytes"):
        read_regular(tmp_path / "x", 1000)


@pytest.mark.skipif(os.name == "nt", reason="POSIX has FIFOs and devices")
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("/dev/null")],
    ids=["fifo", "folder", "endless", "device"],
)
def test_anything_else_is_refused_at_once(tmp_path: Path, make: Any) -> None:
    """A FIFO has no writer here: opened as a file is, it would wait for one."""
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=r"x is a (device or a pipe|folder), not a file"):
        read_regular(tmp_path / "x", 1000)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "x", 1000)
    with pytest.raises(OSError, match="link"):
        read_regular(tmp_path / "link", 1000)
