"""Small LightningModules that the Trainer tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig

CONFIG = LoRAConfig(rank=2, alpha=4, target_modules=["fc1", "fc2"])


class Net(nn.Module):
    """Linear → BatchNorm → two linears that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(self.norm(self.embed(x))).relu())


def make_net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net()


class LitNet(L.LightningModule):
    """Classifies noise. ``late`` builds the network in ``configure_model``; ``schedule`` makes a scheduler of an optimizer."""

    def __init__(self, late: bool = False, schedule: Callable[[torch.optim.Optimizer], Any] | None = None) -> None:
        super().__init__()
        self.net: Net | None = None if late else make_net()
        self.schedule = schedule
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.net is None:
            self.net = make_net()

    def step(self, batch: Any) -> torch.Tensor:
        assert self.net is not None
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.step(batch)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.step(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.step(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert self.net is not None
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return optimizer if self.schedule is None else {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(torch.randn(32, 8, generator=generator), torch.randint(0, 4, (32,), generator=generator))
        return DataLoader(data, batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def trainer(folder: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    kwargs.setdefault("enable_checkpointing", any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks))
    return L.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=folder, **quiet, **kwargs)


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer by name."""
    return {name: tensor.detach().clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
