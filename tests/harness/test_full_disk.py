"""The short version of the harness, which runs with the suite; the long one is marked slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kit import row
from tests.harness import full_disk
from tests.harness.full_disk import SAVES, fail_at_each_operation
from tests.processes import printed

mounts = pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode != 0,
    reason="this user may not have a mount namespace",
)


@pytest.mark.parametrize("name", [name for name in SAVES if not name.startswith("fit")])
@row(32)
def test_a_disk_that_is_full_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The old version or the new one is whole, and nothing is beside it."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # counted all the same
    root = tmp_path / "here"
    assert set(fail_at_each_operation(SAVES[name][0](root), root)) == {0, 1}


def run(every: int, *saves: str) -> list[str]:
    """Fill a disk in a process of its own, which mounts. Return the lines that it printed."""
    return printed(full_disk.main, ["--every", str(every), "--saves", *saves], seconds=3600.0).splitlines()


@mounts
@row(31)
@row(32)
def test_a_small_disk_that_is_full_or_read_only() -> None:
    saves = ["adapter", "shards", "file", "export"]
    said = run(100, *saves)
    assert [line.partition(":")[0] for line in said] == saves
    assert all("1 saves failed on a full disk, 1 on a read-only one" in line for line in said)


@mounts
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_small_disk_with_more_and_more_room() -> None:
    assert len(run(1, *SAVES)) == len(SAVES)
