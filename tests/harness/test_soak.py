"""The short version of the harness, which runs with the suite; the long one is marked slow."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import soak
from tests.harness.fuzz import quiet
from tests.memory import on_linux

pytestmark = on_linux


def test_a_few_cycles_and_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps each record
    with quiet():
        assert soak.cycles(14, tmp_path / "cycles")[0] == 14
        assert soak.fits(12, tmp_path / "fits")[0] == 12


def test_the_harness_sees_it(tmp_path: Path) -> None:
    """Each way to grow counts."""
    left: list[Any] = []

    def once() -> None:
        left.append(torch.zeros(2**20))
        left.append((tmp_path / str(len(left))).open("wb"))
        left.extend({"x": []} for _ in range(30))

    try:
        with pytest.raises(AssertionError, match=r"in 8 rounds: .*'memory'.*'open_files': 8.*'objects'.*'files': 8"):
            soak.repeat(10, once, tmp_path)
    finally:
        for each in left:
            if hasattr(each, "close"):
                each.close()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_cycles_and_fits(tmp_path: Path) -> None:
    with quiet():
        assert soak.cycles(2000, tmp_path / "cycles")[0] >= 2000
        assert soak.fits(200, tmp_path / "fits")[0] >= 200
