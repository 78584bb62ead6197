"""The short version of the harness, which runs with the suite; the long one is marked slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kit import row
from tests.harness.kills import kill_at_each_operation, kill_at_random
from tests.harness.scenarios import SCENARIOS, resumed_fits
from tests.processes import ended, start

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whole, by its name, for every reader; and the next writer finds nothing in its way."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # counted all the same; what the disk does is not what is tested
    found = kill_at_each_operation(SCENARIOS[name](tmp_path / "here"))
    assert found == sorted(found) and set(found) == {0, 1}
    assert len(os.listdir(tmp_path / "here")) == 1, "nothing is left over"


def kill_a_few(folder: Path) -> None:
    assert sum(kill_at_random(SCENARIOS["adapter"](folder / "here"), 4, seed=0).values()) == 4
    assert resumed_fits(folder / "fit", 2, seed=0, steps=12)[0] == 2


@row(33)
def test_a_few_kills_at_random_moments(tmp_path: Path) -> None:
    """In a process of its own: it forks, and pytest's has threads."""
    assert ended(start(kill_a_few, tmp_path)) == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random_moments(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.harness.kills", "--kills", "100", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and "in the child" not in done.stderr, done.stderr
    assert len(done.stdout.splitlines()) == len(SCENARIOS) + 1
