"""LightningModules that change more than their adapters, each in another way."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig

CONFIG = LoRAConfig(rank=2, target_modules=["up"])
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 3


class Lit(L.LightningModule):
    """A backbone that LoRA adapts; subclasses add what plain Lightning would checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.backbone = nn.ModuleDict({"up": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
        self.lr = 1e-2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone["norm"](self.backbone["up"](x))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def test_step(self, batch: Any, index: int) -> None:
        self.log("loss", self(batch[0]).abs().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(X), batch_size=16)

    test_dataloader = train_dataloader


class Statistics(Lit):
    """A buffer that is filled before fit."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - self.mean)

    def prepare(self) -> None:
        self.mean.copy_(X.mean(0) + 1)


class Scaler(nn.Module):
    scale = 1.0

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * float(x.detach().abs().max())
        return x / self.scale


class Extra(Lit):
    """Extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.scaler = Scaler()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaler(super().forward(x))


class Codebook(Lit):
    """A frozen embedding inside the adapted module, of which training moves single rows through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone["code"] = nn.Embedding(512, 8)
        nn.init.zeros_(self.backbone["code"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.backbone["code"].weight.sum(0)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.backbone["code"].weight.data[3] += 0.1
        return super().training_step(batch, index)


class Beside(Lit):
    """A frozen part beside the adapted one that each process draws anew."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(super().forward(x))


class InSetup(Lit):
    """The base is loaded after the adapters came."""

    late = staticmethod(lambda: nn.init.normal_(torch.empty(8, 8), generator=torch.Generator().manual_seed(4)))

    def setup(self, stage: str) -> None:
        self.backbone["up"].weight.data.copy_(self.late())


class InFitStart(InSetup):
    def setup(self, stage: str) -> None:
        pass

    def on_fit_start(self) -> None:
        self.backbone["up"].weight.data.copy_(self.late())


class StrictInSetup(InSetup):
    def setup(self, stage: str) -> None:
        self.backbone["up"].load_state_dict({"weight": self.late(), "bias": torch.ones(8)})


class Flags(Lit):
    """A GAN's critic: frozen at the moment of saving."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.critic(super().forward(x))

    def training_step(self, batch: Any, index: int) -> None:
        self.critic.requires_grad_(True)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self(batch[0]).square().mean())
        optimizer.step()
        self.critic.requires_grad_(False)


class Override(Lit):
    """A state dict of the user's own: without a loss network, with a number, under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.perceptual = 0, nn.Linear(8, 8).requires_grad_(False)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen += 1
        return super().training_step(batch, index)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("loss", self(batch[0]).abs().mean() + self.seen)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        own = super().state_dict(*args, **kwargs)
        return {"seen": self.seen} | {f"my.{key}": value for key, value in own.items() if "perceptual" not in key}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        self.seen = state_dict["seen"]
        rest = {key.removeprefix("my."): value for key, value in state_dict.items() if key != "seen"}
        assert {"backbone.up.weight", "backbone.up.lora_A"} <= rest.keys()  # whole, as plain Lightning gives it
        return super().load_state_dict(rest, strict=False)


KINDS = [Statistics, Extra, Codebook, Beside, InSetup, InFitStart, StrictInSetup, Flags, Override]
