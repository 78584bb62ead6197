from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch import nn

from lightning_lora import LoRACallback, apply_lora
from lightning_lora.strategies import LoRAFSDP2Strategy, arrange
from lightning_lora.strategies.checkpoint_io import DurableCheckpointIO
from tests.lit import CONFIG, LitNet, trainer


def test_hooks_are_installed_once_and_come_off(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1)
    module = LitNet()
    run.validate(module, verbose=False)
    hooks = run.strategy._lora_hooks
    run.fit(module)
    later = run.strategy._lora_hooks
    assert later is hooks and list(later.parts) == ["net"]
    assert later.originals["load_checkpoint"].__func__ is SingleDeviceStrategy.load_checkpoint
    run.fit_loop.max_epochs = 2
    run.fit(LitNet())
    later = run.strategy._lora_hooks
    assert later is not hooks and later.state is not hooks.state
    later.remove()
    assert run.strategy.load_checkpoint.__func__ is SingleDeviceStrategy.load_checkpoint


class Saves(SingleDeviceStrategy):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("never called")


class Optimizes(SingleDeviceStrategy):
    """The hooks call this one's."""

    def setup_optimizers(self, run: Any) -> None:
        self.called = True
        super().setup_optimizers(run)


def test_a_strategy_whose_own_saving_would_be_skipped_is_refused(tmp_path: Path) -> None:
    module = LitNet()
    names = [name for name, _ in module.named_parameters()]
    run = trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1, strategy=Saves(device="cpu"))
    with pytest.raises(ValueError, match=r"strategy=Saves: tests\.strategies\.test_support\.Saves overrides save_checkpoint"):
        run.fit(module)
    assert [name for name, _ in module.named_parameters()] == names
    strategy = Optimizes(device="cpu")
    trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1, strategy=strategy).fit(module)
    assert strategy.called


def test_the_durable_io_replaces_only_the_stock_one(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1)
    run.fit(LitNet())
    assert type(run.strategy.checkpoint_io) is DurableCheckpointIO
    own = AsyncCheckpointIO()
    run = trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1, plugins=[own])
    run.fit(LitNet())
    assert run.strategy.checkpoint_io is own


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_save_leaves_the_checkpoint_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    io, path = DurableCheckpointIO(), tmp_path / "new/last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_nothing_is_staged_outside_the_target_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "not there"))
    monkeypatch.setattr("tempfile.tempdir", None)
    DurableCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True) == {"step": 1}


def test_a_refused_run_gives_the_strategy_its_settings_back() -> None:
    module = apply_lora(LitNet(), CONFIG)
    own = nn.Parameter(torch.zeros(1))
    sharded = FSDPStrategy(parallel_devices=[torch.device("cpu")], cluster_environment=LightningEnvironment(), ignored_states=[own])
    for strategy, precision in ((LoRAFSDP2Strategy(), Precision()), (sharded, FSDPPrecision("32-true"))):
        strategy.precision_plugin = precision
        undo = arrange(strategy, module)
        assert "clip_grad_by_norm" in vars(strategy.precision_plugin)
        arrange(strategy, module)()  # a second run's, which changes nothing
        assert "clip_grad_by_norm" in vars(strategy.precision_plugin)
        assert strategy is not sharded or len(sharded.kwargs["ignored_states"]) == 5
        undo()
        assert "clip_grad_by_norm" not in vars(strategy.precision_plugin)
    assert len(sharded.kwargs["ignored_states"]) == 1 and sharded.kwargs["ignored_states"][0] is own
