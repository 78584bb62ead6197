"""The short version of the harness, which runs with the suite; the long one is marked slow."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.harness import fuzz
from tests.harness.mutations import changed
from tests.memory import on_linux
from tests.storage.hostile import PICKLES, write


def test_a_few_spoilt_files(tmp_path: Path) -> None:
    with fuzz.quiet():
        seen, faults = fuzz.fuzz(tmp_path, range(80), seed=0)
    assert not faults
    assert seen.total() == 80 and all(seen[f"{action}: refused"] for action in ("into_net", "looked_at", "into_lit", "fitted"))


def test_every_reader_refuses_a_hostile_checkpoint(tmp_path: Path) -> None:
    with fuzz.quiet():
        for name in ("a key of doubled tuples", "a sparse index out of range"):
            write(tmp_path / "x.ckpt", PICKLES[name][0])
            for action in (fuzz.into_lit, fuzz.looked_at, fuzz.fitted):
                assert fuzz.verdict(action, tmp_path / "x.ckpt", None, honest=False) == "refused", (name, action.__name__)


@pytest.mark.parametrize(
    ("does", "found"),
    [
        (lambda path: path.name, "same"),
        (lambda path: "other", fuzz.DIFFERS),
        (lambda path: {}["x"], "raises a KeyError"),
        (lambda path: (_ for _ in ()).throw(ValueError(f"{path}\nis bad")), "has not one line"),
        (lambda path: next(_ for _ in ()), "raises a StopIteration"),
        (lambda path: int("x"), "does not name the file"),
        (lambda path: path.read_bytes(), "refused"),
        pytest.param(lambda path: str(len(b"x" * 3 * 10**8)), "takes 28", marks=on_linux),
        (lambda path: str(all(True for _ in iter(int, 1))), "hangs"),
    ],
)
def test_the_harness_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: Any, found: str) -> None:
    """Each way to fail counts as one; a refusal does not."""
    if found == "hangs":
        monkeypatch.setattr(fuzz.signal, "alarm", lambda seconds: fuzz.signal.setitimer(fuzz.signal.ITIMER_REAL, seconds / 1000))
    assert fuzz.verdict(does, tmp_path / "x", "x", honest=False).startswith(found)


def test_a_case_depends_on_its_number_alone() -> None:
    value = {"a": [1, {"b": "x"}], "c": 2.5}
    assert repr(changed(value, random.Random("1/7"))) == repr(changed(value, random.Random("1/7")))
    assert len({repr(changed(value, random.Random(number))) for number in range(50)}) > 25


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_spoilt_files(tmp_path: Path) -> None:
    with fuzz.quiet():
        assert not fuzz.fuzz(tmp_path, range(20_000), seed=1)[1]
