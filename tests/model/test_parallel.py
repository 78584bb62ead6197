"""Clipping over plain tensors and DTensors. What needs several processes is in ``tests/distributed``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora.model.parallel import clip_grad_norm


@pytest.mark.parametrize("grads", [[], [None], [None, [3.0, 4.0]], [[1.0], [2.0, 2.0]]], ids=str)
@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_plain_gradients_are_clipped_as_torch_clips_them(grads: list[list[float] | None], limit: float) -> None:
    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(len(grad or [0.0]))) for grad in grads]
        for parameter, grad in zip(made, grads, strict=True):
            parameter.grad = None if grad is None else torch.tensor(grad)
        return made

    ours, theirs = parameters(), parameters()
    torch.testing.assert_close(clip_grad_norm(ours, limit), torch.nn.utils.clip_grad_norm_(theirs, limit))
    torch.testing.assert_close([p.grad for p in ours if p.grad is not None], [p.grad for p in theirs if p.grad is not None])


class Counting(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_more_gradients_take_no_more_operations_and_each_dtype_is_summed_in_its_own() -> None:
    def clip(number: int) -> tuple[int, Tensor, list[Tensor]]:
        made = [
            nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64) for _ in range(number)
        ]
        for parameter in made:
            parameter.grad = torch.full_like(parameter, 2.0)
        with Counting() as counting:
            norm = clip_grad_norm(made, 1.0)
        return counting.count, norm, [p.grad.double() for p in made if p.grad is not None]

    (few, _, _), (many, norm, clipped) = clip(2), clip(20)
    assert few == many
    assert float(norm) == pytest.approx(2 * 180**0.5)
    torch.testing.assert_close(torch.cat(clipped), torch.full((180,), 180**-0.5, dtype=torch.float64), rtol=2**-8, atol=0.0)
