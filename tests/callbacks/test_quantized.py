"""LoRACallback on quantized bases: from one argument, from Lightning's plugin; checkpoints, resume, merging, optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, find_targets, load_adapter, merge_report
from lightning_lora.callbacks.merging import check_mergeable
from lightning_lora.layers.base import lora_layers
from lightning_lora.quantization.formats import format_of
from tests.layers.experts import tiny_qwen3_moe
from tests.lit import trainer
from tests.quantized import QUANTIZERS, packed_stack, plain_stack

CONFIG = LoRAConfig(rank=2, alpha=4, target_modules=["up", "down"])
each_format = pytest.mark.parametrize("how", QUANTIZERS)


class Lit(L.LightningModule):
    """Regresses noise; ``optimizer`` makes one of parameters."""

    def __init__(self, net: nn.Module | None = None, optimizer: Any = None, late: bool = False) -> None:
        super().__init__()
        self.net = None if late else net or plain_stack()
        self.make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.net is None:
            self.net = plain_stack()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.net(batch[0]) - batch[1]).square().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(torch.randn(16, 128, generator=generator), torch.randn(16, 128, generator=generator))
        return DataLoader(data, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


def fit(
    folder: Path, module: L.LightningModule, callback: LoRACallback, epochs: int = 1, ckpt_path: Any = None, **kwargs: Any
) -> L.Trainer:
    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run = trainer(folder, callback, checkpoints, max_epochs=epochs, **kwargs)
    run.fit(module, ckpt_path=ckpt_path)
    return run


def packed(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_modules() if format_of(child) is not None}


@pytest.mark.parametrize("how, late", [*((how, False) for how in QUANTIZERS), ("nf4", True)])
def test_one_argument_makes_it_qlora(how: str, late: bool, tmp_path: Path) -> None:
    """The base is packed before the adapters come and stays packed; validation passes in between do no harm; nothing merges by itself."""
    module = Lit(late=late)
    fit(tmp_path, module, LoRACallback(CONFIG, quantize=how), epochs=6)
    assert packed(module) == {"net.up", "net.down", "net.head"}
    assert not any(layer.merged for _, layer in lora_layers(module))
    assert sum(module.losses[-2:]) < 0.9 * sum(module.losses[:2])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@each_format
def test_checkpoints_hold_adapters_and_resume_is_exact(how: str, tmp_path: Path) -> None:
    whole, first, rest = (Lit() for _ in range(3))
    fit(tmp_path / "whole", whole, LoRACallback(CONFIG, quantize=how), epochs=2)
    fit(tmp_path / "parts", first, LoRACallback(CONFIG, quantize=how), epochs=1)
    file = tmp_path / "parts" / "epoch=0.ckpt"
    assert all(".lora_" in name for name in torch.load(file, weights_only=True)["state_dict"])
    fit(tmp_path / "rest", rest, LoRACallback(CONFIG, quantize=how), epochs=2, ckpt_path=file)
    assert first.losses + rest.losses == whole.losses
    for mine, theirs in zip(rest.parameters(), whole.parameters(), strict=True):
        assert not mine.requires_grad or torch.equal(mine, theirs)
    plain = load_adapter(plain_stack(), file)  # the same base before it was packed
    assert torch.equal(plain.up.lora_B, load_adapter(packed_stack(how), file).up.lora_B)


@pytest.mark.parametrize("how, quantized", [("nf4", "requantize"), *((how, "dequantize") for how in QUANTIZERS)])
def test_merging_at_the_end_is_asked_for(how: str, quantized: Any, tmp_path: Path) -> None:
    for callback, module in (
        (LoRACallback(CONFIG), Lit(packed_stack(how))),
        (LoRACallback(CONFIG, quantize=how, merge_on_fit_end=True), Lit()),
    ):
        with pytest.raises(ValueError, match=r"net.up.weight is quantized.*merge_on_fit_end=False.*merge_quantized='dequantize'"):
            fit(tmp_path, module, callback)
        assert not module.losses
    module = Lit()
    run = fit(tmp_path, module, LoRACallback(CONFIG, quantize=how, merge_quantized=quantized))
    assert merge_report(module).keys() == {"net.up", "net.down"}
    assert packed(module) == ({"net.head"} if quantized == "dequantize" else {"net.up", "net.down", "net.head"})
    run.test(module, ckpt_path="best", verbose=False)  # unmerges
    assert packed(module) == {"net.up", "net.down", "net.head"} and not merge_report(module)


def test_a_merge_of_what_will_be_sharded_is_refused_at_the_start() -> None:
    for model in (packed_stack("nf4"), apply_lora(packed_stack("nf4"), CONFIG)):
        report = find_targets(model, CONFIG)
        check_mergeable(model, report, SingleDeviceStrategy(), None, "dequantize")
        with pytest.raises(ValueError, match=r"up.weight is quantized and will be sharded .*merge_on_fit_end=False"):
            check_mergeable(model, report, ModelParallelStrategy(), None, "dequantize")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["sideways"]}, "sideways"),
        ({"target_modules": ["up"], "rank": 3, "init": "orthogonal"}, "needs an even rank"),
        ({"target_modules": ["up"], "init": "pissa", "variant": "adalora"}, "AdaLoRA defines its own start"),
    ],
)
def test_a_config_that_does_not_fit_packs_nothing(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    module = Lit()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, LoRACallback(LoRAConfig(**fields), quantize="nf4"))
    assert not packed(module)


def test_wrong_choices_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"quantize='nf3' is not known; there are fp8, int8, nf4"):
        LoRACallback(quantize="nf3")
    with pytest.raises(ValueError, match=r"merge_quantized='yes': choose 'dequantize' or 'requantize'"):
        LoRACallback(merge_quantized="yes")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize(
    "mode, late", [*((mode, False) for mode in ("nf4", "nf4-dq", "fp4", "int8", "int8-training")), ("nf4-dq", True), ("int8", True)]
)
def test_lightnings_own_plugin(mode: Any, late: bool, tmp_path: Path) -> None:
    """It would replace layers after setup, adapters and all: here it converts first."""
    dtype = torch.float16 if mode.startswith("int8") else torch.float32
    plugin = BitsandbytesPrecision(mode, dtype=dtype)
    module = Lit(late=late)
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    run = trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=False), checkpoint, max_epochs=2)
    run.strategy.precision_plugin = plugin  # Trainer(plugins=...) takes it on CUDA only
    run.fit(module)
    assert packed(module) == (set() if mode == "int8-training" else {"net.up", "net.down", "net.head"})
    assert {name for name, _ in lora_layers(module)} == {"net.up", "net.down"}
    assert all(layer.lora_B.any() for _, layer in lora_layers(module))
    if not late:
        load_adapter(plain_stack(), tmp_path / "last.ckpt")  # known as the same base


@pytest.mark.parametrize("how, precision", [("nf4", "bf16-mixed"), *((how, "bf16-true") for how in QUANTIZERS)])
def test_precision_plugins_leave_it_packed(how: str, precision: Any, tmp_path: Path) -> None:
    module = Lit()
    fit(tmp_path, module, LoRACallback(CONFIG, quantize=how), precision=precision)
    assert packed(module) == {"net.up", "net.down", "net.head"}
    assert module.net.up.lora_A.dtype == torch.float32


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles its optimizers, which takes many seconds: here the same functions run as they are."""
    with torch.compiler.set_stance("force_eager"):
        yield


def optimizers() -> dict[str, Any]:
    import bitsandbytes.optim
    import torchao.optim

    return {
        "bnb AdamW8bit": bitsandbytes.optim.AdamW8bit,
        "bnb PagedAdamW8bit": bitsandbytes.optim.PagedAdamW8bit,
        "bnb PagedAdamW32bit": bitsandbytes.optim.PagedAdamW32bit,
        "ao AdamW8bit": torchao.optim.AdamW8bit,
        "ao AdamW4bit": torchao.optim.AdamW4bit,
    }


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["bnb AdamW8bit", "bnb PagedAdamW8bit", "bnb PagedAdamW32bit", "ao AdamW8bit", "ao AdamW4bit"])
def test_small_optimizer_states_resume_exactly(name: str, tmp_path: Path, eager: None) -> None:
    """The libraries' optimizers get what trains, keep its state in few bits, and go on from a checkpoint as if nothing had been."""
    config = LoRAConfig(rank=64, target_modules=["up", "down"])  # both libraries keep small tensors in 32 bit

    def make() -> Lit:
        return Lit(optimizer=lambda parameters: optimizers()[name](parameters, lr=1e-2))

    whole, first, rest = make(), make(), make()
    run = fit(tmp_path / "whole", whole, LoRACallback(config, quantize="nf4"), epochs=2)
    assert len(run.optimizers[0].param_groups[0]["params"]) == 4
    fit(tmp_path / "parts", first, LoRACallback(config, quantize="nf4"), epochs=1)
    fit(tmp_path / "rest", rest, LoRACallback(config, quantize="nf4"), epochs=2, ckpt_path=tmp_path / "parts" / "epoch=0.ckpt")
    assert first.losses + rest.losses == whole.losses and len(set(whole.losses)) == 4
    if "32" not in name:
        small, large = (tmp_path / kind / "epoch=0.ckpt" for kind in ("parts", "adam"))
        fit(tmp_path / "adam", Lit(), LoRACallback(config, quantize="nf4"), epochs=1)
        assert small.stat().st_size < 0.7 * large.stat().st_size


class LitMixture(L.LightningModule):
    """A mixture that predicts the next token of a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_qwen3_moe(layers=1)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.model(batch[0], labels=batch[0]).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.arange(24).reshape(4, 6)), batch_size=2)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("how", ["fp8", "nf4"])
def test_a_mixture_is_quantized_with_its_experts(how: str, tmp_path: Path) -> None:
    """Checkpoints without the base, a resume equal to a run without a stop, and the merge at the end."""
    config = LoRAConfig(rank=2, alpha=4, target_modules="all-linear")
    whole, first, second = LitMixture(), LitMixture(), LitMixture()
    fit(tmp_path / "whole", whole, LoRACallback(config, quantize=how, merge_quantized="dequantize"), epochs=2)
    fit(tmp_path / "first", first, LoRACallback(config, quantize=how))
    (checkpoint,) = (tmp_path / "first").glob("*.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert kept and all("lora_" in name for name in kept)
    fit(tmp_path / "first", second, LoRACallback(config, quantize=how), epochs=2, ckpt_path=checkpoint)
    assert whole.losses[2:] == second.losses and whole.losses[0] > whole.losses[-1]
    experts: Any = whole.model.model.layers[0].mlp.experts
    assert experts.merged and format_of(experts) is None and experts.down_proj.dtype == torch.float32
    assert len(merge_report(whole)) == 5
