"""Experts for `make family`: linear in each weight, so that a formula in float64 is short."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

from lightning_lora.layers.base import LoRALayer
from tests.layers.kinds import Case


class Routed(JetMoeParallelExperts):
    """Experts in one tensor, whose rows are routed already."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input, [4, 0, 3])


@use_experts_implementation(has_gate=False)
class Projections(nn.Module):
    """Experts with a projection up and one down, whose rows are routed already; nothing in between."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(3, 10, 12)), nn.Parameter(torch.randn(3, 12, 10))

    def forward(self, input: Tensor) -> Tensor:
        parts = zip((input[:4], input[4:]), (0, 2), strict=True)
        return torch.cat([nn.functional.linear(nn.functional.linear(x, self.up_proj[e]), self.down_proj[e]) for x, e in parts])


class Several(Case):
    """A module with several weights, each with an adapter."""

    def defined(self, layer: Any, formula: Any, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        weights = {}
        for name, part in layer.by_weight().items():
            own = {short: parameters[f"{short}_{name}"] for short in part.lora_parameters()}
            weights[name] = formula(self, part, part.weight.detach().double(), own)
        return torch.cat([rows @ weights["up_proj"][e].T @ weights["down_proj"][e].T for rows, e in ((x[:4], 0), (x[4:], 2))])


class Stacked(Case):
    """Experts, whose one weight has an adapter with a name of its own in a file and in the module."""

    def apply(self, layer: LoRALayer, W: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x[:4] @ W[0].T, x[4:] @ W[2].T])


def experts() -> nn.Module:
    module = Routed(3, 12, 10)
    nn.init.normal_(module.weight)
    return module


def projections() -> nn.Module:
    return Projections(SimpleNamespace(_experts_implementation="eager"))


def stacked_product(layer: LoRALayer, A: Tensor, B: Tensor) -> Tensor:
    """B·A of every expert; a factor that all share has the rows of one."""
    outputs = layer.weight.shape[1]
    return B.view(-1, outputs, 4) @ A.view(-1, 4, A.shape[1]) + torch.zeros(3, 1, 1, dtype=A.dtype)


CASES: dict[str, Case] = {
    "experts": Stacked(experts, lambda: torch.randn(7, 12), None, lambda _, A, B: B.view(3, 10, -1) @ A.view(3, -1, 12)),
    "experts, shared_outer": Several(
        projections, lambda: torch.randn(7, 12), None, stacked_product, fields={"kind_options": {"experts": {"shared_outer": True}}}
    ),
}
