"""A small model, batches for it, and its adapters with an init that reads data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, apply_lora, initialize_from_data

DATA = ["eva", "lora_ga", "corda"]


class Net(nn.Module):
    """Three linears, one of them stored transposed, and dropout between them."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), Conv1D(20, 24), nn.Linear(20, 12)
        self.drop, self.norm, self.checkpointed = nn.Dropout(0.5), nn.BatchNorm1d(20), checkpointed

    def inner(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(torch.tanh(self.b(torch.tanh(self.a(x))))))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is not None:
            x = x.requires_grad_() if self.checkpointed and torch.is_grad_enabled() else x
            return self.c(checkpoint(self.inner, x, use_reentrant=self.checkpointed))
        return self.c(self.inner(x))


def net(**kwargs: Any) -> Net:
    torch.manual_seed(3)
    return Net(**kwargs).double()


def batches(many: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(30, 16, generator=generator, dtype=torch.float64) for _ in range(many)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def applied(init: str, model: nn.Module | None = None, rank: int = 3, **fields: Any) -> nn.Module:
    config = LoRAConfig(**{"rank": rank, "alpha": 6, "init": init, "target_modules": ["a", "b", "c"], "modules_to_save": [], **fields})
    return apply_lora(net() if model is None else model, config)


def started(init: str, model: nn.Module | None = None, **fields: Any) -> nn.Module:
    return initialize_from_data(applied(init, model, **fields), batches(), step=loss)


def inputs(name: str) -> list[Tensor]:
    """What a layer of the plain model reads of each batch."""
    found: list[Tensor] = []
    model = net().eval()
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    for x in batches():
        model(x)
    return found


def product(layer: Any) -> Tensor:
    return (layer.scaling * layer.lora_B @ layer.lora_A).detach()
