"""Optimizers inside the wrappers of Fabric and of Lightning's manual optimization, which show groups that cannot be set on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim.lr_scheduler import StepLR

from lightning_lora import LoRAConfig, apply_lora, apply_lora_plus, apply_preconditioner, lora_param_groups, resize_ranks
from lightning_lora.optim.groups import unwrapped
from tests.conftest import TinyModel, same_bits

CONFIG = LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"])


def fabrics(optimizer: torch.optim.Optimizer) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of devices that are not used
        return Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


def trained(change: Callable[[Any, torch.nn.Module, Any], object], wrap: Callable[[torch.optim.Optimizer], Any]) -> list[torch.Tensor]:
    """Three steps after a change of the optimizer; what trained."""
    torch.manual_seed(0)
    model = apply_lora(TinyModel(), CONFIG)
    optimizer = wrap(torch.optim.AdamW(lora_param_groups(model, lr=1e-2)))
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    ids = torch.arange(11)[None]

    def step() -> None:
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    change(optimizer, model, scheduler)
    for _ in range(3):
        step()
        scheduler.step()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


CHANGES: dict[str, Callable[[Any, torch.nn.Module, Any], object]] = {
    "LoRA+": lambda optimizer, model, scheduler: apply_lora_plus(optimizer, model, 8.0, scheduler),
    "preconditioned": lambda optimizer, model, scheduler: apply_preconditioner(optimizer, model, "riemannian"),
    "preconditioned once": lambda optimizer, model, scheduler: [
        apply_preconditioner(each, model, "riemannian") for each in (optimizer, unwrapped(optimizer))
    ],
    "other ranks": lambda optimizer, model, scheduler: resize_ranks(model, {"q_proj": 1}, optimizer),
}


@pytest.mark.parametrize("name", CHANGES)
def test_fabrics_optimizer_trains_as_its_own_does(name: str) -> None:
    """LoRA+ set the groups on the wrapper: nothing trained, in silence."""
    mine, plain = trained(CHANGES[name], fabrics), trained(CHANGES[name], lambda optimizer: optimizer)
    assert len(mine) == len(plain) and all(same_bits(*pair) for pair in zip(mine, plain, strict=True))
    unchanged = trained(lambda *_: None, fabrics)
    assert not all(torch.equal(*pair) for pair in zip(mine, unchanged, strict=True))


def test_lightnings_optimizer_of_manual_optimization_shows_the_new_groups() -> None:
    model = apply_lora(TinyModel(), CONFIG)
    optimizer = torch.optim.SGD(lora_param_groups(model, lr=1.0), lr=1.0)
    wrapped: Any = LightningOptimizer(optimizer)
    apply_lora_plus(wrapped, model, 8.0)
    assert wrapped.param_groups is optimizer.param_groups
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(1.0, 4), (1.0, 0), (8.0, 4)]


def test_an_optimizer_that_is_no_wrapper_is_itself() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert unwrapped(optimizer) is optimizer
    around = type("Around", (torch.optim.Optimizer,), {"optimizer": optimizer})(optimizer.param_groups, {})
    assert unwrapped(around) is around  # it keeps a state of its own
