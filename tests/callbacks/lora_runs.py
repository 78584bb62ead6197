"""Short fits under LoRACallback, the schedulers of users, and a loader that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler as S
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback
from tests.lit import CONFIG, LitNet, trainer


def checkpoint_in(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, enable_version_counter=False, **kwargs)


def fit(
    folder: Path, module: LitNet, epochs: int = 2, ckpt: Any = None, callbacks: tuple[L.Callback, ...] = (), **kwargs: Any
) -> L.Trainer:
    lora = kwargs.pop("lora", None) or LoRACallback(CONFIG)
    run = trainer(folder, lora, *callbacks, max_epochs=epochs, **kwargs)
    run.fit(module, ckpt_path=ckpt)
    return run


class OwnAdamW(torch.optim.AdamW):
    """Another library's: it may keep its parameters anywhere."""


class Early(LitNet):
    """Its optimizer is built before the adapters come."""

    optimizer: type[torch.optim.Optimizer] = OwnAdamW

    def __init__(self) -> None:
        super().__init__()
        self.early = self.optimizer(self.parameters(), lr=1e-2)  # type: ignore[call-arg]

    def configure_optimizers(self) -> Any:
        return self.early


SCHEDULES = {
    "StepLR": lambda o: S.StepLR(o, 1, gamma=0.5),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 0.9**step),
    "Cosine": lambda o: S.CosineAnnealingLR(o, 6),
    "OneCycle": lambda o: {"scheduler": S.OneCycleLR(o, 1e-2, total_steps=20), "interval": "step"},
    "Cyclic": lambda o: {"scheduler": S.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False), "interval": "step"},
    "Plateau": lambda o: {"scheduler": S.ReduceLROnPlateau(o, patience=0, threshold=1e3), "monitor": "loss"},
    "Sequential": lambda o: {
        "scheduler": S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 2), S.CosineAnnealingLR(o, 5)], [2]),
        "interval": "step",
    },
}


class Resumable(DataLoader):
    """A loader that Lightning can put back where it was."""

    position = 0

    def __iter__(self) -> Any:
        start = self.position % len(self)
        for self.position, batch in enumerate(super().__iter__(), start=1):
            if self.position > start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
