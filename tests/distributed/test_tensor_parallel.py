"""``layers/pieces.py``: what tensor parallelism has cut is computed on the pieces, whichever base that is, or step aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers import linear as linear_file
from lightning_lora.model.parallel import place_adapters
from tests.calls import python_calls
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


@contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """The names of the layers that are computed on their pieces."""
    local_outputs, served = linear_file.local_outputs, []
    names = {module: name for name, module in model.named_modules()}

    def asked(layers: Any, x: Any) -> Any:
        y = local_outputs(layers, x)
        if y is not None:
            served.extend(names[layer] for layer in layers)
        return y

    with patch.object(linear_file, "local_outputs", asked):
        yield served


def compared(dtype: torch.dtype | None, compiled: bool, bias: bool, options: dict[str, Any]) -> tuple[float, list[str], int]:
    """The worst difference from one process, over a tensor's largest entry; which layers were computed on their pieces; all-reduces."""
    model = adapted(True, bias, **options)
    with CommDebugMode() as mode, watched(model) as served:
        found = step(torch.compile(model, backend="aot_eager") if compiled else model, dtype)
    wanted = step(adapted(False, bias, **options), dtype)
    wrong = {name: (type(tensor), tensor.dtype) for name, tensor in found.items() if tensor.dtype != wanted[name].dtype}
    assert not wrong, wrong
    reduced = sum(number for operation, number in mode.get_comm_counts().items() if "allreduce" in str(operation).replace("_", ""))
    differences = [(found[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-6) for name, tensor in wanted.items()]
    return max(differences).item(), served, reduced


@pytest.mark.parametrize(
    ("dtype", "compiled", "bias", "options", "served"),
    [
        (None, False, False, {}, ["up", "down"]),
        (torch.bfloat16, False, False, {}, ["up", "down"]),
        (None, False, True, {}, ["up", "down"]),  # the bias of a sum is added once
        (None, False, False, {"variant": "lora_fa"}, ["up", "down"]),
        (None, True, False, {}, ["up", "down"]),
    ],
    ids=["plain", "autocast", "bias", "lora_fa", "compiled"],
)
def test_equal_to_one_process(pool: Any, dtype: Any, compiled: bool, bias: bool, options: dict[str, Any], served: list[str]) -> None:
    for difference, layers, _ in pool.run(compared, dtype, compiled, bias, options):
        assert difference < (1e-5 if dtype is None else 0.03) and layers == served


def test_one_collective_for_each_factor_that_is_whole(pool: Any) -> None:
    # The base's own: the sum of down's output, and that of the gradient of up's input. The adapters': up's A, down's B.
    for _, _, collectives in pool.run(compared, None, False, False, {}):
        assert collectives == 4


def calls() -> int:
    model, x = adapted(True), torch.ones(2, 5, 8)
    return python_calls(lambda: model(x))


def test_few_python_calls(pool: Any) -> None:
    """Of two linears; each took 74 when every call asked for what does not change between calls."""
    for number in pool.run(calls):
        assert number <= 48, number


def masks() -> bool:
    """Under dropout DTensors' own random numbers are drawn, the same on all ranks."""
    model = adapted(True, dropout=0.5)
    with watched(model) as served:
        assert not isinstance(model(torch.ones(2, 8)), DTensor)
    return not served


def test_dropout_steps_aside(pool: Any) -> None:
    assert all(pool.run(masks))


def refused() -> bool:
    """What crosses between ranks has no derivative of its own, so what would be wrong is refused."""
    model, x = adapted(True), torch.ones(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, retain_graph=True)
    assert grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="under tensor parallelism"):
        torch.autograd.functional.jacobian(model, x.detach(), vectorize=True)
    return True


def test_second_derivatives_are_refused(pool: Any) -> None:
    assert all(pool.run(refused))


def whole_bias() -> float:
    """A bias that is whole beside rows of W: the base's own operations do that."""
    torch.manual_seed(2)
    layer = apply_lora(nn.Sequential(nn.Linear(8, 16)), config=LoRAConfig(rank=3, target_modules=["0"]))
    fill_adapters(layer)
    x = torch.linspace(-1, 1, 16).view(2, 8)
    wanted = layer(x)
    mesh, linear = init_device_mesh("cpu", (dist.get_world_size(),)), layer[0]
    for name, place in (("weight", Shard(0)), ("bias", Replicate()), ("lora_A", Replicate()), ("lora_B", Shard(0))):
        linear._parameters[name] = nn.Parameter(
            distribute_tensor(linear._parameters[name].detach(), mesh, [place]), name.startswith("lora")
        )
    return (layer(distribute_tensor(x, mesh, [Replicate()])).full_tensor() - wanted).abs().max().item()


def test_a_bias_that_is_whole_steps_aside(pool: Any) -> None:
    assert max(pool.run(whole_bias)) < 1e-6
