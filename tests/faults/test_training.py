"""What would go wrong in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRACallback,
)
from lightning_lora.layers import LoRALayer
from tests.conftest import base_bits
from tests.faults.kit import Int8Linear, refused, row
from tests.lit import CONFIG as FC
from tests.lit import LitNet, trainer


@row(50)
def test_a_quantized_base_under_the_callback(tmp_path: Path) -> None:
    """Known at the start, whether it would be merged at the end or not."""
    for merge in (True, False):
        model = LitNet()
        model.net.fc1, model.net.fc2 = Int8Linear(16), nn.Linear(16, 4)
        with refused("net.fc1", "stores its weight as torch.int8", folder=tmp_path):
            trainer(tmp_path, LoRACallback(FC, merge_on_fit_end=merge), max_epochs=1).fit(model)
        assert not model.losses


class EarlyOptimizer(LitNet):
    """Builds its optimizer before there are adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.optimizer


class HalfOptimizer(LitNet):
    """Hands one of the two adapted layers over."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.fc1.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (EarlyOptimizer, ("4 parameters", "net.fc1.lora_A", "net.fc2.lora_B", "configure_optimizers", "not in __init__")),
        (HalfOptimizer, ("2 parameters", "net.fc2.lora_A", "net.fc2.lora_B", "get_lora_parameters(self)")),
    ],
    ids=["all", "some"],
)
@row(54)
def test_an_optimizer_without_the_adapters(tmp_path: Path, module: type[LitNet], said: tuple[str, ...]) -> None:
    model = module()
    before = base_bits(model)
    with refused(*said, folder=tmp_path):
        trainer(tmp_path, LoRACallback(FC), ModelCheckpoint(), max_epochs=1).fit(model)
    assert base_bits(model) == before
    assert not model.losses, "before the first step"


class Reentrant(LitNet):
    """The adapted layers run in a re-entrant checkpoint, whose input comes from frozen layers and needs no gradient."""

    head = False

    def step(self, batch: Any) -> Tensor:
        net = self.net
        hidden = net.norm(net.embed(batch[0]))
        inner = (lambda x: net.fc1(x).relu()) if self.head else (lambda x: net.fc2(net.fc1(x).relu()))
        y = checkpoint(inner, hidden, use_reentrant=True)
        return nn.functional.cross_entropy(net.fc2(y) if self.head else y, batch[1])


class ReentrantBody(Reentrant):
    head = True


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(
    ("module", "batches", "said"),
    [
        (ReentrantBody, 4, ("1 of 2 adapted layers got no gradient in 4 batches", "net.fc1", "exclude_modules")),
        (Reentrant, 1, ("the loss does not depend on any adapter",)),
    ],
    ids=["some_inside", "all_inside"],
)
@row(55)
def test_checkpointing_that_cuts_the_graph(tmp_path: Path, module: type[LitNet], batches: int, said: tuple[str, ...]) -> None:
    """Some layers may be used only now and then, so their lack is told at the end of a short training, which has its checkpoint by then."""
    model = module()
    with refused(*said, "use_reentrant=False", error=RuntimeError, folder=tmp_path if batches == 1 else None):
        trainer(tmp_path, LoRACallback(FC), ModelCheckpoint(), max_epochs=1).fit(model)
    assert len(model.losses) == batches
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, LoRALayer))
