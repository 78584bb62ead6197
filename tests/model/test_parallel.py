"""Clipping over plain tensors and DTensors. What needs several processes is in ``tests/distributed``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
