"""Gradients and optimizer state after a change of ranks: against a run that had the rank already, and Adam's own bounds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, lora_layers, resize_ranks
from tests.optim.resized import adapted, loss_of


def of_low_rank(rank: int) -> nn.Module:
    """A model whose updates have fewer directions than their adapters."""
    model = adapted(seed=3)
    resize_ranks(model, {".*": rank}, ())
    resize_ranks(model, {".*": 4}, ())
    with torch.no_grad():
        for _, layer in lora_layers(model):  # spread over all rows and columns
            r = layer.lora_B.shape[1]
            M = torch.eye(r) + 0.2 * torch.randn(r, r)
            for k in range(layer.lora_A.shape[0] // r):
                rows = layer.lora_A[k * r : (k + 1) * r]
                rows.copy_((M.double() @ rows.flatten(1)).view_as(rows))
            layer.lora_B.copy_((layer.lora_B.flatten(1) @ torch.linalg.inv(M.double())).view_as(layer.lora_B))
    return model


def test_gradients_and_momentum_follow_exactly() -> None:
    """If no update is lost, they are those of a run that had the lower rank already."""
    model = of_low_rank(2)
    optimizer = torch.optim.SGD(get_lora_parameters(model), lr=0.0, momentum=0.9)
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
    twin = copy.deepcopy(model)
    resize_ranks(model, {".*": 2}, optimizer)
    carried = {name: (p.grad, optimizer.state[p]["momentum_buffer"]) for name, p in model.named_parameters() if p.requires_grad}
    resize_ranks(twin, {".*": 2}, ())
    fresh = torch.optim.SGD(get_lora_parameters(twin), lr=0.0, momentum=0.9)
    for seed in range(3):
        fresh.zero_grad()
        loss_of(twin, seed).backward()
        fresh.step()
    for name, p in twin.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(carried[name][0], p.grad, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(carried[name][1], fresh.state[p]["momentum_buffer"], rtol=1e-8, atol=1e-10)


def one_linear(A: torch.Tensor, B: torch.Tensor) -> tuple[nn.Module, Any]:
    model: Any = apply_lora(nn.Sequential(nn.Linear(A.shape[1], B.shape[0]).double()), LoRAConfig(rank=A.shape[0], target_modules=["0"]))
    with torch.no_grad():
        model[0].lora_A.copy_(A)
        model[0].lora_B.copy_(B)
    return model, model[0]


def test_squares_follow_exactly_where_directions_are_only_sorted() -> None:
    A = 2 * torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q.t()
    B = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q * torch.tensor([1.0, 5.0, 3.0])
    model, layer = one_linear(A, B)
    optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=0.0, amsgrad=True)
    for _ in range(4):
        optimizer.zero_grad()
        (model(torch.randn(5, 7).double()) * torch.randn(5, 6).double()).sum().backward()
        optimizer.step()
    before = {name: {slot: v.clone() for slot, v in optimizer.state[p].items()} for name, p in layer.lora_parameters().items()}
    resize_ranks(model, {"0": 2}, optimizer)
    order = [1, 2]
    for slot in ("exp_avg_sq", "max_exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[layer.lora_A][slot], before["lora_A"][slot][order], rtol=1e-9, atol=0)
        torch.testing.assert_close(optimizer.state[layer.lora_B][slot], before["lora_B"][slot][:, order], rtol=1e-9, atol=0)
    assert optimizer.state[layer.lora_A]["step"] == 4


def test_a_state_that_has_seen_no_step_follows() -> None:
    """A fused Adam whose first step a gradient scaler skipped has moments of zero, and a step count of zero."""
    model, layer = one_linear(torch.randn(3, 7).double(), torch.randn(6, 3).double())
    optimizer = torch.optim.Adam(get_lora_parameters(model))
    for p in layer.lora_parameters().values():
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    resize_ranks(model, {"0": 2}, optimizer)
    for p in layer.lora_parameters().values():
        assert all(slot.shape in ((), p.shape) and not slot.any() for slot in optimizer.state[p].values())


def test_no_step_becomes_larger_than_adams_bound() -> None:
    """Gradients of one sign: each entry's step is one rate, before and after."""
    model, layer = one_linear(torch.randn(4, 7).double(), torch.randn(6, 4).double())
    optimizer = torch.optim.Adam(get_lora_parameters(model), lr=1.0)
    x, w = torch.randn(5, 7).double(), torch.randn(5, 6).double()
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.zero_grad()
        (model(x) * w).sum().backward()
        optimizer.step()
    resize_ranks(model, {"0": 2}, optimizer)
    for p in layer.lora_parameters().values():
        slots = optimizer.state[p]
        m, v = slots["exp_avg"] / (1 - 0.9**3), slots["exp_avg_sq"] / (1 - 0.999**3)
        assert torch.allclose(m.abs() / v.sqrt(), torch.ones_like(m), rtol=1e-6)


def test_new_directions_take_steps_of_the_old_ones_size() -> None:
    """After many steps Adam corrects no bias: with second moments of zero the first steps would be 3 to 6 times the rate."""
    model, layer = one_linear(torch.randn(4, 7).double() / 7**0.5, torch.zeros(6, 4).double())
    optimizer = torch.optim.Adam(get_lora_parameters(model), lr=1e-4)
    sizes = []
    for step in range(320):
        if step == 300:
            resize_ranks(model, {"0": 8}, optimizer)
        optimizer.zero_grad()
        (model(torch.randn(5, 7).double()) * torch.randn(5, 6).double()).sum().backward()
        before = layer.lora_B.detach().clone()
        optimizer.step()
        if step >= 300:
            moved = (layer.lora_B.detach() - before).abs() / 1e-4
            sizes.append((float(moved[:, :4].mean()), float(moved[:, 4:].mean())))
    old, new = (sum(each) / len(sizes) for each in zip(*sizes, strict=True))
    assert 0.5 < new / old < 1.5 and max(new for _, new in sizes) < 1
