"""A change of gradients right before a step: behind the closure, behind clipping, once a step, whatever optimizer and whoever calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from lightning_lora.optim.before_step import before_step
from tests.optim.test_own_form import SlowWeights


def doubling(weight: nn.Parameter, seen: list[Tensor]) -> Any:
    def change() -> None:
        assert weight.grad is not None
        seen.append(weight.grad.clone())
        weight.grad.mul_(2)

    return change


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))


@pytest.mark.parametrize("how", ["plain", "closure", "positional closure", "none", "scheduled", "around another"])
def test_the_step_uses_the_changed_gradient(how: str) -> None:
    weight, seen = parameter(), list[Tensor]()
    inner = torch.optim.SGD([weight], lr=0.5)
    optimizer: Any = SlowWeights(inner) if how == "around another" else inner
    before_step(optimizer, doubling(weight, seen))
    if how == "scheduled":
        StepLR(optimizer, 1)  # which wraps the optimizer's step

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum() / 2
        loss.backward()
        nn.utils.clip_grad_norm_([weight], 1.0)
        return loss

    if how == "closure":
        assert optimizer.step(closure=closure) == 12.5
    elif how == "positional closure":
        assert optimizer.step(closure) == 12.5
    else:
        closure()
        optimizer.step(None) if how == "none" else optimizer.step()
    torch.testing.assert_close(seen, [torch.tensor([0.6, 0.8], dtype=torch.float64)], rtol=0, atol=1e-6)  # clipped, and once
    torch.testing.assert_close(weight.data, torch.tensor([3.0 - 0.6, 4.0 - 0.8], dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_scaler_unscales_first_and_skips_with_the_step() -> None:
    weight, seen = nn.Parameter(torch.ones(2)), list[Tensor]()
    optimizer, scaler = torch.optim.SGD([weight], lr=0.5), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before_step(optimizer, doubling(weight, seen))
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [grad.tolist() for grad in seen] == [[1.0, 1.0]] and weight.tolist() == [0.0, 0.0]


class NotTorchs:
    """As some libraries' optimizers: the right methods, but no hooks."""

    def step(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.optim.LBFGS([parameter()]), "LBFGS searches along gradients of the loss"),
        (NotTorchs, "NotTorchs calls none of torch's hooks"),
    ],
)
def test_what_cannot_be_hooked_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        before_step(make(), lambda: None)
