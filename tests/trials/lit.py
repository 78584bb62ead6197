"""A LightningModule with all that trials must not share, and fits of it: of several trials, and alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_lora import LoRACallback, LoRAConfig, get_lora_parameters
from lightning_lora.trials.own_settings import OPTIONS
from tests.callbacks.lora_runs import Resumable
from tests.trials.nets import Rows

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
CONFIG = LoRAConfig(rank=2, dropout=0.2, target_modules=["0", "4"])


class Lit(L.LightningModule):
    """Has all that trials must not share: dropout, BatchNorm, a metric, a list that steps append to, a scheduler, a batch taken apart."""

    def __init__(self, learning_rate: float = 0.05, weight_decay: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.model = nn.Sequential(
                nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
            )
        self.model = self.model.double()
        self.accuracy = MulticlassAccuracy(3)
        self.seen: list[float] = []
        self.steps = 0

    def loss(self, batch: dict[str, Any]) -> Any:
        labels = batch.pop("labels")  # as the code of many models does
        logits = self.model(batch["pixel_values"])
        return F.cross_entropy(logits, labels), logits, labels

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, *_ = self.loss(batch)
        self.steps += 1
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "kept": loss.item()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("kept", outputs["kept"] + float(outputs["loss"]))

    def validation_step(self, batch: Any) -> None:
        loss, logits, labels = self.loss(batch)
        self.accuracy(logits, labels)
        self.seen.append(float(loss))
        self.log("val_accuracy", self.accuracy, on_epoch=True)
        self.log_dict({"val_loss": loss})

    def on_validation_epoch_end(self) -> None:
        self.log("val_worst", max(self.seen))
        self.seen.clear()

    def configure_optimizers(self) -> Any:
        rates = {"lr": self.hparams["learning_rate"], "weight_decay": self.hparams["weight_decay"]}
        optimizer = torch.optim.AdamW(self.parameters(), **rates, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders() -> tuple[DataLoader, DataLoader]:
    """Loaders that draw nothing of the run's random numbers."""
    mine = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return DataLoader(Rows(), 4, shuffle=True, generator=mine[0]), DataLoader(Rows(), 4, generator=mine[1])


def resumable() -> tuple[DataLoader, DataLoader]:
    """Loaders of which Lightning keeps the place in the epoch."""
    return Resumable(Rows(), 4, generator=torch.Generator()), loaders()[1]


def fit(
    module: L.LightningModule, callback: LoRACallback, *callbacks: Callback, seed: int = 7, ckpt: Any = None, **options: Any
) -> L.Trainer:
    L.seed_everything(seed, verbose=False)
    options = {"max_epochs": 3, "enable_checkpointing": False} | options
    train, val = options.pop("loaders", loaders)()
    trainer = L.Trainer(callbacks=[callback, *callbacks], **QUIET | options)
    trainer.fit(module, train, val, ckpt_path=ckpt)
    return trainer


def alone(
    given: dict[str, Any], *callbacks: Callback, config: LoRAConfig = CONFIG, make: Any = Lit, **options: Any
) -> tuple[Any, L.Trainer]:
    """A fit with a trial's settings, without a sweep."""
    config = replace(config, **{key: value for key, value in given.items() if hasattr(config, key)})
    rates = {key: value for key, value in given.items() if key in ("learning_rate", "weight_decay")}
    callback = LoRACallback(config, merge_on_fit_end=False, **{key: value for key, value in given.items() if key in OPTIONS})
    module = make(**rates)
    return module, fit(module, callback, *callbacks, seed=given.get("seed", 7), **options)


def same(one: nn.Module, other: nn.Module) -> None:
    """All parameters and buffers are equal; the adapter has moved."""
    states = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-9, atol=1e-11, msg=name)
    assert get_lora_parameters(one)[1].abs().max() > 0


GIVEN = [
    {"rank": 2},
    {"rank": 1, "learning_rate": 0.02, "weight_decay": 0.0, "name": "small"},
    {"rank": 3, "seed": 5, "lora_plus_ratio": 4.0, "dropout": 0.0},
    {"variant": "dora", "target_modules": ["4"], "modules_to_save": ["6"], "alpha": 3.0},
]

STOPPING = [{"learning_rate": 0.05}, {"learning_rate": 20.0, "name": "wild"}]
