"""SIGTERM and Ctrl-C: a checkpoint to go on from, the exit code that a shell expects. The signals are real, raised within a step."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_lora import LoRACallback, get_lora_parameters
from lightning_lora.callbacks.companions import add_companions
from lightning_lora.callbacks.interruption import NAME, Interruption
from tests.lit import CONFIG, LitNet, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory",
    "ignore:.*was called without a model",
    "ignore:.*there is no last checkpoint",
    "ignore:You're resuming from a checkpoint",
    "ignore:Be aware that when",
)


class Raise(L.Callback):
    """Raises signals within the training step that leads to step ``at``."""

    def __init__(self, *signals: signal.Signals, at: int = 4) -> None:
        self.signals, self.at = signals, at

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step + 1 == self.at:
            for number in self.signals:
                signal.raise_signal(number)


def run(folder: Path, *callbacks: L.Callback, steps: int = 8, ckpt_path: str | None = None, **options: Any) -> LitNet:
    torch.manual_seed(0)  # A's first values
    module = LitNet()
    saver = ModelCheckpoint(folder, save_top_k=0)
    run = trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False), saver, *callbacks, max_epochs=-1, max_steps=steps, **options)
    run.fit(module, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, number: signal.Signals, code: int) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, Raise(number))  # the last batch of the first epoch
    assert stop.value.code == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    saved = torch.load(tmp_path / NAME, weights_only=True)
    assert saved["global_step"] == 4 and all("lora_" in name for name in saved["optimizer_states"][0]["state"])

    resumed, whole = run(tmp_path, ckpt_path="last"), run(tmp_path / "whole")
    assert len(resumed.losses) == 4 and resumed.losses == whole.losses[4:]
    for mine, theirs in zip(get_lora_parameters(resumed), get_lora_parameters(whole), strict=True):
        assert torch.equal(mine, theirs)
    assert not (tmp_path / NAME).exists()  # "last" is not to mean it once the run is complete


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, Raise(signal.SIGINT, signal.SIGINT))
    assert isinstance(stop.value.__context__, KeyboardInterrupt) and stop.value.code == 1  # Lightning's
    assert not (tmp_path / NAME).exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_stays(tmp_path: Path) -> None:
    seen: list[int] = []
    usual = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        run(tmp_path, Raise(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, usual)
    assert seen == [signal.SIGINT]


@pytest.mark.parametrize("options", [{"enable_checkpointing": False}, {"saver": "mine"}])
def test_who_saves_none_or_on_exceptions_gets_none_of_ours(tmp_path: Path, options: dict[str, Any]) -> None:
    own = [OnExceptionCheckpoint(str(tmp_path), "mine")] if options.pop("saver", None) else []
    savers = [] if options else [ModelCheckpoint(tmp_path, save_top_k=0), *own]
    lora = LoRACallback(CONFIG, merge_on_fit_end=False)
    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path, lora, *savers, Raise(signal.SIGTERM), max_epochs=2, **options).fit(LitNet())
    assert stop.value.code == 143
    assert [file.name for file in tmp_path.glob("*.ckpt")] == (["mine.ckpt"] if own else [])


def test_a_test_run_that_is_stopped_says_so(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_test_batch_start(self, *args: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path, LoRACallback(CONFIG), Stop()).test(LitNet(), verbose=False)
    assert stop.value.code == 143


def test_a_trainer_gets_one_and_keeps_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1)
    for _ in range(2):
        assert add_companions(made) is made.callbacks
    assert sum(isinstance(callback, Interruption) for callback in made.callbacks) == 1
