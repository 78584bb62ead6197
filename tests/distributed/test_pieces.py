"""``layers/pieces.py``: what tensor parallelism has cut is computed on the pieces, whichever base that is, or step aside."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers import linear as linear_file
from lightning_lora.parallel import place_adapters
from tests.distributed.nets import adapter_tensors, fill_adapters


class MLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.up, self.down = nn.Linear(8, 16, bias=bias), nn.Linear(16, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(parallel: bool, bias: bool = False, dropout: float = 0.0, **options: Any) -> nn.Module:
    model = apply_lora(MLP(bias), config=LoRAConfig(rank=3, alpha=6, dropout=dropout, target_modules=["up", "down"], **options))
    if parallel:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        place_adapters(model)
    fill_adapters(model)
    return model


def step(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output, the input's gradient and the adapters'."""
    x = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = model(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **adapter_tensors(model, lambda p: p.grad)}


def compared(dtype: torch.dtype | None, compiled: bool, bias: bool, options: dict[str, Any]) -> tuple[float, list[str], int]:
    """The worst difference from one process, which layers were computed on their pieces, and the all-reduces of a step."""
    on_pieces, served = linear_file.on_pieces, []
    model = adapted(True, bias, **options)
    names = {module: name for name, module in model.named_modules()}
    with CommDebugMode() as mode, patch.object(linear_file, "on_pieces", lambda *seen: served.append(names[seen[0]]) or on_pieces(*seen)):
        found = step(torch.compile(model, backend="aot_eager") if compiled else model, dtype)
    wanted = step(adapted(False, bias, **options), dtype)
    wrong = {name: (type(tensor), tensor.dtype) for name, tensor in found.items() if tensor.dtype != wanted[name].dtype}
    assert not wrong, wrong
    reduced = sum(number for operation, number in mode.get_comm_counts().items() if "all_reduce" in str(operation))
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted), served, reduced


@pytest.mark.parametrize(
    ("dtype", "compiled", "bias", "options", "served"),
    [
        (None, False, False, {}, ["up", "down"]),
        (torch.bfloat16, False, False, {}, ["up", "down"]),
        (None, False, True, {}, ["up"]),  # the bias of a sum is added once, by the base
        (None, False, False, {"variant": "lora_fa"}, ["up", "down"]),
        (None, True, False, {}, ["up", "down"]),
    ],
    ids=["plain", "autocast", "bias", "lora_fa", "compiled"],
)
def test_equal_to_one_process(pool: Any, dtype: Any, compiled: bool, bias: bool, options: dict[str, Any], served: list[str]) -> None:
    for difference, layers, _ in pool.run(compared, dtype, compiled, bias, options):
        assert difference < (1e-5 if dtype is None else 0.1) and layers == served


def test_one_collective_for_each_factor_that_is_whole(pool: Any) -> None:
    # The base's own: the sum of down's output, and that of the gradient of up's input. The adapters': up's A, down's B.
    for _, _, collectives in pool.run(compared, None, False, False, {}):
        assert collectives == 4


def masks() -> bool:
    """Under dropout DTensors' own random numbers are drawn, the same on all ranks."""
    model = adapted(True, dropout=0.5)
    with patch.object(linear_file, "on_pieces", side_effect=AssertionError("has no mask for all ranks")):
        assert not isinstance(model(torch.ones(2, 8)), DTensor)
    return True


def test_dropout_steps_aside(pool: Any) -> None:
    assert all(pool.run(masks))
