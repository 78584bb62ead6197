"""The short version of the harness, which runs with the suite; the long one is marked slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kit import row
from tests.harness.kills import kill_at_each_operation
from tests.harness.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whole, by its name, for every reader; and the next writer finds nothing in its way."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # counted all the same; what the disk does is not what is tested
    found = kill_at_each_operation(SCENARIOS[name](tmp_path / "here"))
    assert found == sorted(found) and set(found) == {0, 1}
    assert len(os.listdir(tmp_path / "here")) == 1, "nothing is left over"


SHORT = """
import sys
from pathlib import Path
from tests.harness.kills import kill_at_random
from tests.harness.scenarios import SCENARIOS, resumed_fits
print(sum(kill_at_random(SCENARIOS["adapter"](Path(sys.argv[1], "here")), 4, seed=0).values()))
print(resumed_fits(Path(sys.argv[1], "fit"), 2, seed=0, steps=12)[0])
"""


def run(*arguments: str) -> list[str]:
    """Run in a process of its own: it forks, and pytest's has threads."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and "in the child" not in done.stderr, done.stderr
    return done.stdout.splitlines()


@row(33)
def test_a_few_kills_at_random_moments(tmp_path: Path) -> None:
    assert run("-c", SHORT, str(tmp_path)) == ["4", "2"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random_moments(tmp_path: Path) -> None:
    assert len(run("-m", "tests.harness.kills", "--kills", "100", "--folder", str(tmp_path))) == len(SCENARIOS) + 1
