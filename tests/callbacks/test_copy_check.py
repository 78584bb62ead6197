"""Copies of an adapted part that have no adapters and that training writes into: said, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, quantize_base
from lightning_lora.layers.base import LoRALayer
from tests.callbacks.changing_modules import Lit
from tests.lit import bits, trainer

CONFIG = LoRAConfig(rank=2, target_modules=["up"])


def by_pairs(mine: nn.Module, theirs: nn.Module) -> None:
    for m, t in zip(mine.parameters(), theirs.parameters(), strict=False):
        m.data.mul_(0.9).add_(t.data, alpha=0.1)


def by_names(mine: nn.Module, theirs: nn.Module) -> None:
    state = theirs.state_dict()
    for name, value in mine.state_dict().items():
        value.lerp_(state[name], 0.1)


def by_loading(mine: nn.Module, theirs: nn.Module) -> None:
    mine.load_state_dict(theirs.state_dict())


def by_nothing(mine: nn.Module, theirs: nn.Module) -> None:
    pass


class Follows(Lit):
    """A target network that ``follow`` moves after each batch."""

    def __init__(self, follow: Callable[[nn.Module, nn.Module], None]) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.backbone).requires_grad_(False)
        self.follow = follow

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.target["norm"](self.target["up"](batch[0] + 1))
        return (self(batch[0]) - wanted).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.follow(self.target, self.backbone)


def fit(folder: Path, follow: Callable[[nn.Module, nn.Module], None], **options: Any) -> Follows:
    module = Follows(follow)
    trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False, **options), max_epochs=1).fit(module)
    return module


def test_a_copy_that_got_the_base_alone_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'target' is a copy of 'backbone', without its adapters, and training wrote into it"):
        fit(tmp_path, by_names, module="backbone")


@pytest.mark.parametrize(("follow", "error"), [(by_pairs, r"size|shape"), (by_loading, "lora_A")])
def test_torchs_errors_say_what_to_do(tmp_path: Path, follow: Any, error: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?s){error}.*'target' is a copy of 'backbone', without its adapters.*under a LoRACallback"):
        fit(tmp_path, follow, module="backbone")


@pytest.mark.parametrize("options", [{"module": "backbone"}, {}])
def test_a_reference_that_stays_is_no_news(tmp_path: Path, options: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    fit(tmp_path, by_nothing, **options)
    assert not [warning for warning in recwarn if "copy" in str(warning.message)]


def in_inference_mode(module: Follows) -> None:
    with torch.inference_mode():
        module.target = copy.deepcopy(module.backbone).requires_grad_(False)


def quantized(module: Follows) -> None:
    for part in (module.backbone, module.target):
        quantize_base(part, "torchao-int8")


@pytest.mark.parametrize("change", [in_inference_mode, quantized])
@pytest.mark.parametrize("options", [{"module": "backbone"}, {}])
def test_tensors_of_other_kinds(tmp_path: Path, change: Any, options: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    """Ones without a count of writes, and ones that torch cannot compare."""
    module = Follows(by_nothing)
    change(module)
    trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=False, **options), max_epochs=1).fit(module)
    assert isinstance(module.target["up"], LoRALayer) == (options == {})
    assert not [warning for warning in recwarn if "copy" in str(warning.message)]


class Replaces(Follows):
    def on_train_batch_end(self, *args: Any) -> None:
        self.target = copy.deepcopy(self.backbone).requires_grad_(False)


class Drops(Follows):
    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.target = None


@pytest.mark.parametrize("cls", [Replaces, Drops])
def test_a_copy_that_is_replaced_or_dropped(tmp_path: Path, cls: type[Follows], recwarn: pytest.WarningsRecorder) -> None:
    trainer(tmp_path, LoRACallback(CONFIG, module="backbone", merge_on_fit_end=False), max_epochs=1).fit(cls(by_nothing))
    assert not [warning for warning in recwarn if "copy" in str(warning.message)]


@pytest.mark.parametrize("follow", [by_pairs, by_names, by_loading])
def test_with_adapters_in_both_it_follows_and_resumes(tmp_path: Path, follow: Any) -> None:
    def run(epochs: int, ckpt: Path | None = None) -> tuple[Follows, L.Trainer]:
        module = Follows(follow)
        fits = trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=epochs)
        torch.manual_seed(0)
        fits.fit(module, ckpt_path=ckpt)
        return module, fits

    whole, _ = run(2)
    assert whole.target["up"].lora_B.abs().sum() > 0
    run(1)[1].save_checkpoint(tmp_path / "a.ckpt")
    rest, _ = run(2, tmp_path / "a.ckpt")
    assert all(torch.equal(value, bits(whole)[name]) for name, value in bits(rest).items())
