"""A base that moves in training: what an adapter folder holds of it afterwards, and callbacks that unfreeze weights under adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, load_adapter, save_adapter
from tests.callbacks.changing_modules import CONFIG, Codebook, Lit
from tests.lit import trainer


class Clamped(Lit):
    """Clamps every weight after each step, the adapted one too."""

    def on_train_batch_end(self, *args: Any) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.1, 0.1)


class Scripted(Lit):
    """A compiled module beside the adapted layer, with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone["script"] = torch.jit.script(nn.Sequential(nn.BatchNorm1d(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone["script"](super().forward(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:Found 1 module")
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("cls", [Codebook, Clamped, Scripted])
def test_a_folder_holds_what_moved(cls: type[Lit], merge: bool, tmp_path: Path) -> None:
    module = cls()
    trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=merge), max_epochs=1).fit(module)
    loaded = load_adapter(cls(), save_adapter(module, tmp_path / "a"))
    x = torch.arange(16.0).view(2, 8)
    torch.testing.assert_close(loaded.eval()(x), module.eval()(x))


SKIPPED = "ignore:The provided params to be frozen already exist"  # Lightning: the adapters are in the optimizer already


class Unfreezes(BaseFinetuning):
    """Unfreezes the backbone in the second epoch."""

    def freeze_before_training(self, module: Any) -> None:
        """Freezes nothing more."""

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone, optimizer)


@pytest.mark.filterwarnings(SKIPPED)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Unfreezes, r"'backbone.up' has an adapter, and an optimizer got its frozen weight too.*exclude_modules=\['backbone.up'\]"),
        (BackboneFinetuning, "callbacks: BackboneFinetuning would unfreeze the backbone, and train the weights under its adapters too"),
    ],
)
def test_callbacks_that_unfreeze_adapted_weights_are_refused(callback: Any, message: str, first: bool, tmp_path: Path) -> None:
    module, pair = Lit(), [callback(), LoRACallback(CONFIG)]
    before = module.backbone["up"].weight.clone()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, *(pair if first else pair[::-1]), max_epochs=2).fit(module)
    assert torch.equal(module.backbone["up"].weight, before)


class Freezes(Unfreezes):
    """Freezes the backbone, with what is adapted in it."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.backbone)

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        """Unfreezes nothing."""


class Head(Lit):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(x))


def test_unfreezing_what_has_no_adapter_goes_on(tmp_path: Path) -> None:
    """It trains, and the folder has it."""
    module = Head()
    config = LoRAConfig(rank=2, target_modules=["head"])
    before = module.backbone["up"].weight.clone()
    callbacks: list[L.Callback] = [Unfreezes(), LoRACallback(config)]
    with pytest.warns(UserWarning, match="LoRA freezes what has no adapter: backbone"):
        trainer(tmp_path, *callbacks, max_epochs=3).fit(module)
    assert not torch.equal(module.backbone["up"].weight, before)
    loaded = load_adapter(Head(), save_adapter(module, tmp_path / "a"))
    x = torch.arange(16.0).view(2, 8)
    torch.testing.assert_close(loaded.eval()(x), module.eval()(x))


def test_adapters_that_were_frozen_after_the_setup(tmp_path: Path) -> None:
    """Some of them are a warning; all of them are an error, where torch would say that a list is empty."""
    with pytest.warns(UserWarning, match="1 adapted layer will not train: backbone.up. Their adapters were frozen after LoRACallback"):
        trainer(tmp_path, LoRACallback(LoRAConfig(rank=2, target_modules=["up", "head"])), Freezes(), max_epochs=1).fit(Head())
    with pytest.raises(ValueError, match="nothing in Lit trains: its adapters were frozen after LoRACallback added them"):
        trainer(tmp_path, LoRACallback(CONFIG), Freezes(), max_epochs=1).fit(Lit())
