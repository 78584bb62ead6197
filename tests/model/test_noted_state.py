"""Buffers and extra state that moved since a model was adapted: told from the base's, by copies too; and forgotten with the adapters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, unload_lora
from lightning_lora.model.noted_state import base_buffers, moved_extra_state

CONFIG = LoRAConfig(rank=2, target_modules=["up"])


class Scaler(nn.Module):
    scale: Any = 1.0

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]


class Model(nn.Module):
    """A running mean, a count, a buffer that no state dict has, and a module with extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scaler = nn.Linear(4, 4), Scaler()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("beside", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean, self.count = self.mean * 0.9 + x.mean(0) * 0.1, self.count + 1
        return self.up(x - self.mean)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_moved(copied: Any) -> None:
    model = apply_lora(Model(), CONFIG)
    assert base_buffers(model, moved=True) == {} and moved_extra_state(model) == []
    model(torch.ones(2, 4))
    model.scaler.scale = 2.0
    model = copied(model)
    moved = base_buffers(model, moved=True)
    assert list(moved) == ["mean", "count"] and moved["mean"] is model.mean
    assert base_buffers(model, moved=False) == {} and moved_extra_state(model) == ["scaler"]
    unload_lora(model)
    assert base_buffers(model, moved=True) == {} and not any("noted" in name for name in vars(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_moves_nothing(dtype: torch.dtype) -> None:
    """As precision="bf16-true" does after the model was adapted. A folder would hold all buffers, rounded."""
    model = Model()
    model.mean.copy_(torch.rand(4))
    apply_lora(model, CONFIG).to(dtype)
    assert base_buffers(model, moved=True) == {} and list(base_buffers(model, moved=False)) == ["mean", "count"]
    model.mean[0] += 1
    assert list(base_buffers(model, moved=True)) == ["mean"]


def test_extra_state_that_cannot_be_compared_counts_as_moved() -> None:
    model = Model()
    model.scaler.scale = lambda: 1
    assert moved_extra_state(apply_lora(model, CONFIG)) == ["scaler"]


def test_odd_buffers_are_left_out() -> None:
    model = Model()
    model.register_buffer("table", torch.eye(3).to_sparse())
    model.register_buffer("late", torch.zeros(3, device="meta"))
    assert list(base_buffers(apply_lora(model, CONFIG), moved=False)) == ["mean", "count"]
