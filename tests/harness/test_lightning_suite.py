"""The harness that runs Lightning's own tests, on a few of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_lora import LoRACallback
from tests.harness import lightning_suite
from tests.harness.injected import injecting

TESTS = """
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

def fit(tmp_path, **kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer, model = Trainer(default_root_dir=tmp_path, fast_dev_run=True, **quiet, **kwargs), BoringModel()
    trainer.fit(model)
    return trainer, model

def test_trains(tmp_path):
    fit(tmp_path)

def test_fails_anyway(tmp_path):
    assert fit(tmp_path) is None

def test_base(tmp_path):
    assert fit(tmp_path)[1].layer.weight.requires_grad

def test_ours(tmp_path):
    assert type(fit(tmp_path)[1].layer).__name__ == "Linear"
"""


@pytest.mark.slow
def test_failures_are_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    assert lightning_suite.main(["--tests", str(tmp_path), "test_some.py"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["OURS  test_some.test_ours", "expected  test_some.test_base: asserts that base weights train"]
    assert lines[-1] == "1 fail without the callback, 2 only with it, 1 of them are ours"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("E   ValueError: strategy=X is not supported under LoRACallback; there are A", "refused by name"),
        ("model.weight = 1\nE   KeyError: 'x'", None),  # the test's own line does not count
        ("E   assert False\nE    +  where False = Linear().weight.requires_grad", "asserts that base weights train"),
        ("E   AttributeError: 'NoneType' object has no attribute 'x'", None),
    ],
)
def test_a_reason_is_read_from_the_error(text: str, expected: str | None) -> None:
    assert lightning_suite.reason(text) == expected


def test_a_trainer_gets_one_callback_and_keeps_its_own() -> None:
    given: list[Any] = []
    init = injecting(lambda self, callbacks: given.append(callbacks))
    mine = LoRACallback()
    for callbacks in (None, mine, [mine]):
        init(None, callbacks=callbacks)
    assert [len(callbacks) for callbacks in given] == [1, 1, 1]
    assert isinstance(given[0][0], LoRACallback) and given[1] == given[2] == [mine]
