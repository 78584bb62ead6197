"""The short version of the harness, which runs with the suite; the long one is marked slow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kit import row
from tests.harness.rank_kills import kill_in_a_save, uninterrupted

ROOT = Path(__file__).parents[2]


@row(44)
@row(33)
def test_a_rank_that_is_killed_in_a_save_of_shards(tmp_path: Path) -> None:
    """The other ends with an error that names it; the old checkpoint is whole; the fit resumes from it to the bit."""
    expected = uninterrupted(tmp_path, 3, shards=True)
    assert kill_in_a_save(tmp_path, 0, True, expected, [9]) == [1]
    assert kill_in_a_save(tmp_path, 1, True, expected, [2]) == [1]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_of_fits_on_two_processes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.rank_kills", "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6, done.stderr
