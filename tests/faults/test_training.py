"""What would go wrong in training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRACallback,
    get_lora_parameters,
    load_adapter,
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


class OwnSGD(torch.optim.SGD):
    """Another library's: unlike torch's, it cannot be given the adapters later."""


class EarlyOptimizer(LitNet):
    """Builds its optimizer before there are adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = OwnSGD(self.parameters(), lr=0.1)

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


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("averaging", [EMAWeightAveraging, StochasticWeightAveraging])
@row(56)
def test_averages_of_the_whole_model(tmp_path: Path, averaging: Any, first: bool) -> None:
    """In either order, before anything is changed."""
    averages = averaging(swa_lrs=1e-2) if averaging is StochasticWeightAveraging else averaging()
    pair = [averages, LoRACallback(FC)]
    model = LitNet()
    with refused("callbacks", averaging.__name__, "copies the whole model", "Leave it out", model=model.net, folder=tmp_path):
        trainer(tmp_path, *(pair if first else pair[::-1]), max_epochs=1).fit(model)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
@row(61)
def test_half_precision_keeps_adapters_in_fp32(tmp_path: Path, precision: Any) -> None:
    """Lightning casts the module after `setup`; in fp16, the gradient scaler would refuse gradients in fp16."""
    model = LitNet()
    run = trainer(tmp_path, LoRACallback(FC, merge_on_fit_end=False), max_epochs=1, precision=precision)
    run.fit(model)
    assert model.net.fc1.weight.dtype == (torch.float16 if precision == "16-true" else torch.bfloat16)
    assert {p.dtype for p in get_lora_parameters(model)} == {torch.float32}
    assert {v.dtype for s in run.optimizers[0].state.values() for k, v in s.items() if k.startswith("exp")} == {torch.float32}
    assert all(math.isfinite(loss) for loss in model.losses)


class Fails(LitNet):
    """At step 6 its loss is NaN, or the memory is out."""

    error: Exception | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 6 and self.error is not None:
            raise self.error
        return loss * math.nan if self.global_step == 6 else loss


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
@row(37)
def test_out_of_memory(tmp_path: Path, error: Exception) -> None:
    """The last good checkpoint is kept, and the message names what takes less memory."""
    torch.manual_seed(0)
    model = Fails()
    model.error = error
    with pytest.raises(type(error)) as caught:
        trainer(tmp_path, LoRACallback(FC), every_step(tmp_path), max_epochs=2).fit(model)
    assert caught.value is error
    for text in (str(type(error)("")), "batch_size", "accumulate_grad_batches", "quantize=", "precision='bf16-true'", "lora_fsdp2"):
        assert text in str(caught.value)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    loaded = load_adapter(LitNet(), tmp_path / "last.ckpt")
    for mine, theirs in zip(get_lora_parameters(loaded), get_lora_parameters(model), strict=True):
        assert torch.equal(mine, theirs) and mine.any()


@row(38)
def test_nan(tmp_path: Path) -> None:
    """Training stops, and the checkpoint of before is there and is resumed from."""
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)nan"):
        trainer(tmp_path, LoRACallback(FC), every_step(tmp_path), max_epochs=2).fit(Fails())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] <= 6
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@row(38)
def test_resume_from_nan(tmp_path: Path) -> None:
    trainer(tmp_path, LoRACallback(FC, merge_on_fit_end=False), every_step(tmp_path), max_epochs=1).fit(LitNet())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved["state_dict"]["net.fc1.lora_A"].fill_(math.nan)
    torch.save(saved, tmp_path / "last.ckpt")
    model = LitNet()
    with refused(str(tmp_path / "last.ckpt"), "net.fc1.lora_A", "NaN", model=model.net, folder=tmp_path):
        trainer(tmp_path, LoRACallback(FC), max_epochs=2).fit(model, ckpt_path=tmp_path / "last.ckpt")
