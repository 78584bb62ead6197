"""Runs under LoRA+ and the schedulers that users write, for the tests of LoRA+."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler as S

from lightning_lora import LoRACallback
from tests.lit import CONFIG, LitNet, trainer

RATE, RATIO = 1e-2, 16

# Each schedules the one group of LitNet's AdamW, as its user wrote it: some with lists of one entry, some with absolute rates.
SCHEDULERS = {
    "OneCycle": lambda o: S.OneCycleLR(o, 3 * RATE, total_steps=20),
    "OneCycle list": lambda o: S.OneCycleLR(o, [3 * RATE], total_steps=20, three_phase=True),
    "Cyclic": lambda o: S.CyclicLR(o, RATE / 10, RATE, step_size_up=3),
    "Plateau": lambda o: S.ReduceLROnPlateau(o, patience=0, threshold=1e3, min_lr=RATE / 3),
    "Plateau list": lambda o: S.ReduceLROnPlateau(o, patience=0, threshold=1e3, min_lr=[RATE / 3]),
    "Sequential": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 3), S.CosineAnnealingLR(o, 5, eta_min=RATE / 2)], [3]),
    "Chained": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.5, 4), S.ExponentialLR(o, 0.9)]),
    "Lambda": lambda o: S.LambdaLR(o, lambda step: 0.9**step),
    "Lambda list": lambda o: S.LambdaLR(o, [lambda step: 0.9**step]),
    "Multiplicative": lambda o: S.MultiplicativeLR(o, lambda step: 0.9),
    "Cosine": lambda o: S.CosineAnnealingLR(o, 6, eta_min=RATE / 4),
    "Warm restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3, eta_min=RATE / 4),
    "Polynomial": lambda o: S.PolynomialLR(o, 8),
    "MultiStep": lambda o: S.MultiStepLR(o, [2, 4, 6], 0.5),
}


class Scheduled(LitNet):
    """LitNet with a scheduler that steps every batch; notes the settings in force at each optimizer step."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.make, self.steps = schedule, []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.1)
        optimizer.register_step_post_hook(lambda o, args, kwargs: self.note(o))
        scheduler = self.make(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "loss", "strict": False}}

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        names = {id(p): name.rpartition(".")[2] for name, p in self.named_parameters()}
        held = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
        self.steps.append({name: [group[key] for key in ("lr", "betas", "weight_decay")] for name, group in held})


def fit(folder: Path, module: LitNet, ratio: float, epochs: int, *callbacks: Any, ckpt: Any = None) -> Any:
    torch.manual_seed(5)
    run = trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False, lora_plus_ratio=ratio), *callbacks, max_epochs=epochs)
    run.fit(module, ckpt_path=ckpt)
    return run


def checkpoint(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
