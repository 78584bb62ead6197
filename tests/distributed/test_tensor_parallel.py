"""``layers/tensor_parallel.py`` and ``layers/plan_hooks.py``: computed on the local shards, whichever base that is, or by DTensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, apply_lora, unload_lora
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


class AllReduces(TorchDispatchMode):
    """Counts them. torch's ``CommDebugMode`` has hooks of its own, which give each linear another input tensor."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # their collectives come by once they are plain tensors
        self.number += "allreduce" in str(func).replace("_", "")
        return func(*args, **(kwargs or {}))


def compared(dtype: torch.dtype | None, compiled: bool, bias: bool, options: dict[str, Any]) -> tuple[float, list[str], int]:
    """The worst difference from one process, over a tensor's largest entry; which layers were computed on their pieces; all-reduces."""
    model = adapted(True, bias, **options)
    with AllReduces() as mode, watched(model) as served:
        found = step(torch.compile(model, backend="aot_eager") if compiled else model, dtype)
    wanted = step(adapted(False, bias, **options), dtype)
    wrong = {name: (type(tensor), tensor.dtype) for name, tensor in found.items() if tensor.dtype != wanted[name].dtype}
    assert not wrong, wrong
    differences = [(found[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-6) for name, tensor in wanted.items()]
    return max(differences).item(), served, mode.number


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


def calls() -> tuple[int, int]:
    """Python functions of a training step, torch's included: adapted, and the plan's own base alone."""
    x = torch.ones(2, 5, 8, requires_grad=True)

    def train(net: nn.Module) -> None:
        net.zero_grad()
        net(x).sum().backward()

    return tuple(python_calls(partial(train, net), everywhere=True) for net in (adapted(True), unload_lora(adapted(True))))


def test_fewer_python_calls_than_the_base(pool: Any) -> None:
    """Two linears forward and backward: 0.4 of what the plan's own base takes. It was 1.5 when hooks made DTensors around each."""
    for mine, base in pool.run(calls):
        assert mine < 0.7 * base, (mine, base)


def in_parts() -> tuple[float, bool]:
    """Sequence parallelism: each rank has its part of the sequence. Worst difference, and if the plan's hooks were taken over."""
    config = LoRAConfig(rank=3, alpha=6, target_modules=["up", "down"])
    plan = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
    model = apply_lora(parallelize_module(MLP(False), init_device_mesh("cpu", (dist.get_world_size(),)), plan), config=config)
    alone = apply_lora(MLP(False), config=config)
    found = []
    for net in (model, alone):
        fill_adapters(net)
        x = torch.linspace(-1, 1, 2 * 6 * 8).view(2, 6, 8)
        x = x.chunk(dist.get_world_size(), 1)[dist.get_rank()] if net is model else x
        net(x).square().sum().backward()
        found.append(adapter_tensors(net, lambda p: p.grad))
    return max((found[0][n] - tensor).abs().max().item() for n, tensor in found[1].items()), model.up.lora_split is not None


def test_a_plan_that_gathers_a_sequence_keeps_its_hooks(pool: Any) -> None:
    for difference, taken_over in pool.run(in_parts):
        assert difference < 1e-5 and not taken_over


def unloaded() -> bool:
    """Without its adapter a linear is as the plan left it, and takes another one, of a variant that only DTensors compute."""
    model, x = adapted(True), torch.ones(2, 8)
    unload_lora(model)
    assert type(model.up) is nn.Linear and "lora_split" not in vars(model.up)
    torch.testing.assert_close(model(x), MLP(False)(x))
    apply_lora(model, config=LoRAConfig(rank=3, variant="dora", target_modules=["up", "down"]))
    assert model.up.lora_split is None
    torch.testing.assert_close(model(x), MLP(False)(x))
    unload_lora(model)
    return apply_lora(model, config=LoRAConfig(rank=3, target_modules=["up"])).up.lora_split is not None


def test_unloaded_and_adapted_again(pool: Any) -> None:
    assert all(pool.run(unloaded))


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
