"""Adapters that came after wrapping: equal on every rank whatever each rank's batch uses, and whatever becomes of the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, shrink_adalora
from lightning_lora.utils.sharding import full_tensor
from tests.distributed.nets import adapter_tensors, fill_adapters, same_on_all_ranks

WIDTH = 8


class Mixture(nn.Module):
    """``a`` serves every batch, ``b`` some, ``c`` none."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        x = self.a(x).tanh()
        return self.b(x) if both else x


def loss(model: nn.Module, rank: int, both: bool) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH) + rank
    return model(x, both).square().sum()


def wrapped(how: str, variant: str = "plain") -> nn.Module:
    """Sharded first, adapted after. ``"2d"`` has tensor parallelism too, over a half of the processes (over one of two)."""
    model = Mixture()
    if how == "fsdp2":
        fully_shard(model)
    else:
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
        plan = {"a": ColwiseParallel(output_layouts=Replicate()), "b": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    apply_lora(model, LoRAConfig(rank=2, target_modules=["a", "b", "c"], variant=variant))
    fill_adapters(model)
    if how == "2d moved":
        model.to("cpu")  # torch swaps DTensors here
    return model


def trained(how: str, passes: int) -> dict[str, Any]:
    """Gradients after some backward passes of which rank 0 alone uses ``b``, with those of one process."""
    rank, world = dist.get_rank() // (dist.get_world_size() // 2), 2
    model, alone = wrapped(how), apply_lora(Mixture(), LoRAConfig(rank=2, target_modules=["a", "b", "c"]))
    fill_adapters(alone)
    for _ in range(passes):
        loss(model, rank, both=rank == 0).backward()
        sum(loss(alone, each, both=each == 0) / world for each in range(world)).backward()
    grads = [{n: full_tensor(p.grad) for n, p in each.named_parameters() if p.grad is not None} for each in (model, alone)]
    torch.optim.SGD(get_lora_parameters(model), 0.1, momentum=0.9).step()
    return {"grads": grads[0], "alone": grads[1], "same": same_on_all_ranks(adapter_tensors(model))}


@pytest.mark.parametrize(("how", "passes"), [("fsdp2", 1), ("fsdp2", 2), ("2d", 2), ("2d moved", 1)])
def test_a_rank_that_does_not_use_a_layer_gets_the_mean_too(pool: Any, how: str, passes: int) -> None:
    for result in pool.run(trained, how, passes):
        assert result["same"]
        assert result["grads"].keys() == result["alone"].keys() == {f"{m}.lora_{p}" for m in "ab" for p in "AB"}  # none for c
        torch.testing.assert_close(result["grads"], result["alone"], rtol=1e-5, atol=1e-6)


def test_partial_sums_of_gradients_get_the_mean_too(pool4: Any) -> None:
    """A row-parallel layer's gradient of B is a partial sum on each rank that has one."""
    for result in pool4.run(trained, "2d", 1):
        assert result["same"] and result["grads"].keys() == result["alone"].keys()
        torch.testing.assert_close(result["grads"], result["alone"], rtol=1e-5, atol=1e-6)


def shrunk() -> dict[str, Any]:
    """Gradients after shrinking, with those of one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, alone = wrapped("fsdp2", "adalora"), apply_lora(Mixture(), LoRAConfig(rank=2, target_modules=["a", "b", "c"], variant="adalora"))
    fill_adapters(alone)
    for each in (model, alone):
        with torch.no_grad():
            each.b.lora_E[0] = 0
        assert shrink_adalora(each) == {"a": 2, "b": 1, "c": 2}
    loss(model, rank, both=True).backward()
    sum(loss(alone, each, both=True) / world for each in range(world)).backward()
    return {"grads": adapter_tensors(model, lambda p: p.grad), "alone": adapter_tensors(alone, lambda p: p.grad)}


def test_what_adalora_shrank_is_averaged_too(pool: Any) -> None:
    for result in pool.run(shrunk):
        assert len(result["grads"]) == 4
        torch.testing.assert_close(result["grads"], result["alone"], rtol=1e-5, atol=1e-6)
