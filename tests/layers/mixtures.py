"""Mixtures of experts as the tests of several weights adapt them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from tests.conftest import adapted, fill
from tests.layers.experts import tiny_mixtral, tiny_qwen3_moe

MODELS = {"qwen3-moe": tiny_qwen3_moe, "mixtral": tiny_mixtral}
CONFIG = LoRAConfig(rank=2, alpha=6, target_modules=["experts"])
IDS = torch.arange(12).reshape(2, 6)
FQN = "model.layers.0.mlp.experts"
every_model = pytest.mark.parametrize("model", MODELS)


def experts(model):
    return model.get_submodule(FQN)


def one_layer(**fields):
    """The experts of one block, adapted and filled, in a model of their own."""
    model = nn.ModuleDict({"experts": experts(tiny_qwen3_moe())})
    return adapted(model, rank=2, alpha=6, target_modules=["experts"], **fields)


def dropout_gradients(model, checkpointed):
    """Gradients of adapters on experts and q, whose masks are drawn from one seed."""
    config = LoRAConfig(rank=2, dropout=0.3, target_modules=["experts", "q_proj"])
    model = fill(apply_lora(model, config), std=0.1).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7)
    model(IDS).logits.square().sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def routed(layer, dtype=torch.float32):
    """Hidden states (N, H), the experts of each token (N, 2) and their shares (N, 2)."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(10, 32, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.stack([torch.randperm(layer.num_experts, generator=generator)[:2] for _ in range(10)])
    return x, index, torch.rand(10, 2, generator=generator, dtype=torch.float64).to(dtype)
