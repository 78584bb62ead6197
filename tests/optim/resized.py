"""A model with adapters of every kind that have trained, its updates as matrices, a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_layers
from lightning_lora.model.layer_statistics import low_rank_layers
from tests.layers.experts import tiny_qwen3_moe


class Kinds(nn.Module):
    """A layer of each kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.grouped, self.conv = nn.Embedding(11, 8, padding_idx=0), nn.Conv1d(8, 12, 3, groups=2), nn.Conv1d(12, 6, 1)
        self.linear, self.out = nn.Linear(6, 10), nn.Linear(10, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.linear(self.conv(self.grouped(self.embed(ids).mT).tanh()).mT).tanh())


EVERY_KIND = ("embed", "grouped", "conv", "linear", "out")
IDS = torch.arange(22).view(2, 11) % 11


def adapted(kind: str = "every", seed: int = 0, **fields: Any) -> nn.Module:
    """A model in float64 whose adapters have trained."""
    torch.manual_seed(seed)
    model = tiny_qwen3_moe() if kind == "experts" else Kinds()
    names = ["experts"] if kind == "experts" else EVERY_KIND
    apply_lora(model.double(), LoRAConfig(**{"rank": 4, "alpha": 6, "target_modules": names, **fields}))
    with torch.no_grad():
        for name, layer in lora_layers(model):
            for short, p in layer.lora_parameters().items():
                p.add_(torch.randn_like(p) * 0.3)
                if name == "embed" and short == "lora_A":
                    p[:, 0] = 0  # the padding row
    return model


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    """s·B·A of each weight as matrices, one for each product."""
    return {name: layer.to_matrix(layer.merge_delta().detach()) for name, layer in low_rank_layers(model).items()}


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank] @ Vh[..., :rank, :]


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    weights = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (model(IDS) * weights).sum()
