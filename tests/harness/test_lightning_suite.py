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
    count = len(list(fit(tmp_path)[1].parameters()))
    assert count == 2
"""


@pytest.mark.slow
def test_failures_are_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    assert lightning_suite.main(["--tests", str(tmp_path), "test_some.py"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["OURS  test_some.test_ours", "expected  test_some.test_base: asserts that base weights train"]
    assert lines[-1] == "4 tests, 3 fail with the callback, 2 only with it, 1 of them are ours"


REFUSAL = """
>           raise ValueError(f"strategy={name} is not supported under LoRACallback")
E           ValueError: strategy=X is not supported under LoRACallback

/src/lightning_lora/strategies/support.py:45: ValueError
"""
FAULT = """
>       return state["LoRACallback"]
E       KeyError: 'LoRACallback'

/src/lightning_lora/callbacks/saving.py:9: KeyError
"""
ASSERTION = """
>       assert model.layer.weight.requires_grad
E       assert False
E        +  where False = Linear().weight.requires_grad

tests_pytorch/test_some.py:3: AssertionError
"""
OTHER = """
>       model.weight = trainer.x
E       AttributeError: 'NoneType' object has no attribute 'x'

tests_pytorch/test_some.py:3: AttributeError
"""
NO_MATCH = """
>       with pytest.raises(ValueError, match="other"):
E       AssertionError: Regex pattern did not match.
E         Actual message: {message}

tests_pytorch/test_some.py:3: AssertionError
"""
SPAWNED = """
>           raise ProcessRaisedException(msg, error_index, failed_process.pid)
E           torch.multiprocessing.spawn.ProcessRaisedException:
E             File "/src/lightning_lora/strategies/support.py", line 45, in check_supported
E               raise ValueError(
E           ValueError: strategy=X

/site-packages/torch/multiprocessing/spawn.py:215: ProcessRaisedException
"""
FOLLOWS = "\nDuring handling of the above exception, another exception occurred:\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REFUSAL, "refused by name"),
        (FAULT, None),
        (ASSERTION, "asserts that base weights train"),
        (OTHER, None),  # the test's own line does not count
        (REFUSAL + FOLLOWS + NO_MATCH, "refused by name"),
        (NO_MATCH.format(message="'callbacks: X copies the whole model: after LoRACallback in the list'"), "refused by name"),
        (NO_MATCH.format(message="'invalid literal'"), None),
        (REFUSAL + FOLLOWS + FAULT, None),
        (SPAWNED, "refused by name"),
        (SPAWNED.replace("raise ValueError(", "self.device"), None),
    ],
)
def test_a_reason_is_read_from_the_traceback(text: str, expected: str | None) -> None:
    assert lightning_suite.reason(text) == expected


def test_a_trainer_gets_one_callback_and_keeps_its_own() -> None:
    given: list[Any] = []
    init = injecting(lambda self, callbacks: given.append(callbacks))
    mine = LoRACallback()
    for callbacks in (None, mine, [mine]):
        init(None, callbacks=callbacks)
    assert [len(callbacks) for callbacks in given] == [1, 1, 1]
    assert isinstance(given[0][0], LoRACallback) and given[1] == given[2] == [mine]
