"""Lightning's learning-rate finder under LoRACallback: it keeps LoRA+'s ratio, and the run after it is the run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.layers import lora_layers

RATIO, FIND = 8.0, {"min_lr": 1e-4, "max_lr": 1.0}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")


class Noisy(L.LightningModule):
    """Dropout, shuffled rows, a schedule; it notes losses, rows and the rates of each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = 3e-3
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).double()
        self.seen: list[tuple[float, float]] = []
        self.rates: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.seen.append((batch[0][0, 0].item(), loss.item()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-3)
        optimizer.register_step_post_hook(lambda own, *_: self.rates.append([group["lr"] for group in own.param_groups]))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> DataLoader:
        draw = torch.Generator().manual_seed(3)
        x, y = (torch.randn(48, size, generator=draw, dtype=torch.float64) for size in (6, 3))
        return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)


def trainer(folder: Path, init: str, *callbacks: L.Callback) -> L.Trainer:
    config = LoRAConfig(rank=2, target_modules="all-linear", dropout=0.1, modules_to_save=[], init=init)
    torch.manual_seed(1)
    quiet: dict[str, Any] = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    lora = LoRACallback(config, lora_plus_ratio=RATIO)
    return L.Trainer(default_root_dir=folder, max_epochs=2, accelerator="cpu", callbacks=[*callbacks, lora], **quiet)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_run_after_the_tuner_is_the_run_without_it(init: str, tmp_path: Path) -> None:
    """Adapters, optimizer, base, random numbers and the place in the data: equal to the bit."""
    direct, tuned = Noisy(), Noisy()
    trainer(tmp_path, init).fit(direct)
    run = trainer(tmp_path, init)
    found = Tuner(run).lr_find(tuned, num_training=20, update_attr=False, **FIND)
    assert found is not None and len(found.results["lr"]) > 10
    assert not any(layer.merged for _, layer in lora_layers(tuned)) and not list(tmp_path.glob(".lr_find*"))
    tried, tuned.seen, tuned.rates = tuned.rates, [], []
    assert tried[0][0] == pytest.approx(FIND["min_lr"]) and tried[-1][0] > 50 * tried[0][0]
    assert all(b == pytest.approx(RATIO * a) for a, b in tried)
    run.fit(tuned)
    assert len(direct.seen) == 24 and tuned.seen == direct.seen and tuned.rates == direct.rates
    for name, parameter in direct.named_parameters():
        assert torch.equal(parameter, tuned.get_parameter(name)), name


def test_the_suggestion_is_the_rate_of_a(tmp_path: Path) -> None:
    module = Noisy()
    run = trainer(tmp_path, "kaiming")
    found = Tuner(run).lr_find(module, num_training=20, **FIND)
    assert found is not None and module.lr == found.suggestion() != 3e-3
    module.rates = []
    run.fit(module)
    assert module.rates[0] == pytest.approx([module.lr, RATIO * module.lr])


def test_the_finder_as_a_callback_restores_adapters_and_ratio(tmp_path: Path) -> None:
    """Inside a fit Lightning sets the loaders up again, so the rows come in another order, as they do without LoRA."""

    class Start(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.weights = [p.detach().clone() for p in pl_module.parameters()]
            assert not trainer.optimizers[0].state and trainer.global_step == 0

    starts = Start(), Start()
    direct, module = Noisy(), Noisy()
    trainer(tmp_path, "kaiming", starts[0]).fit(direct)
    trainer(tmp_path, "kaiming", LearningRateFinder(num_training_steps=20, update_attr=False, **FIND), starts[1]).fit(module)
    assert all(torch.equal(*pair) for pair in zip(starts[0].weights, starts[1].weights, strict=True))
    assert all(b == pytest.approx(RATIO * a) for a, b in module.rates) and module.rates[-24][0] == pytest.approx(3e-3)
