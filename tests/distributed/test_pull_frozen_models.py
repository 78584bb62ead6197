"""``pull_frozen`` on other models: tied weights, unloaded adapters, uneven pieces, two dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_lora import LoRAConfig, apply_lora, unload_lora
from lightning_lora.experimental.pull_frozen import average
from lightning_lora.strategies.fsdp2 import shard_blocks
from lightning_lora.utils.sharding import full_tensor
from tests.distributed.nets import CONFIG, Net, fill_adapters, make_data, make_net, train
from tests.distributed.pulled import alone, group_of, sharded, step
from tests.distributed.wrappers import fsdp2_pulled, tensor_parallel


class Tied(Net):
    """What is embedded is what is predicted, by one weight that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.embed.weight = nn.Parameter(torch.randn(16, 8, generator=torch.Generator().manual_seed(2)))
        self.out = nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ self.out(torch.eye(8, device=x.device)[:4]).T[:8]


def tied() -> tuple[Any, Any]:
    both = []
    for wrapped in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model: Any = apply_lora(Tied(), config=CONFIG)
        model.embed.weight.requires_grad_()
        model = fsdp2_pulled(model) if wrapped else model
        fill_adapters(model)
        rank, world = (dist.get_rank(), dist.get_world_size()) if wrapped else (0, 1)
        train(model, 3, rank, world)
        both.append({name: full_tensor(p).detach().clone() for name, p in model.named_parameters()})
    return both[0], both[1]


def test_a_tied_weight_that_trains(pool: Any) -> None:
    for mine, wanted in pool.run(tied):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


def unloaded() -> list[str]:
    model = sharded(LoRAConfig(rank=4, target_modules=["q", "fc1"], variant="lora_fa"))
    step(model)
    unload_lora(model)
    with torch.no_grad():
        model(make_data()[0])
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def test_unloaded_adapters_stay_away(pool: Any) -> None:
    assert pool.run(unloaded) == [[], []]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 5), nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Uneven(nn.Module):
    """Widths that two ranks do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(8, 7), nn.Sequential(*(Odd() for _ in range(3))), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(x)))


def make_uneven() -> Uneven:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Uneven()


UNEVEN = LoRAConfig(rank=2, target_modules=["up", "down"], modules_to_save=["head"])


def uneven() -> tuple[Any, Any, list[bool]]:
    model, other = sharded(UNEVEN, make_uneven), alone(UNEVEN, make_uneven)
    train(model, 3, dist.get_rank(), dist.get_world_size())
    train(other, 3)
    found, wanted = ({name: full_tensor(p).detach().clone() for name, p in each.named_parameters()} for each in (model, other))
    return found, wanted, [param.sharded_param.requires_grad for param in group_of(model)._gathered]


def test_uneven_pieces_and_a_head_that_trains(pool: Any) -> None:
    for mine, wanted, gathered in pool.run(uneven):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)
        assert gathered == [True, True]  # the head's weight and bias


def test_two_dimensions(pool4: Any) -> None:
    for mine, wanted in pool4.run(over_tensor_parallel):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


def over_tensor_parallel() -> tuple[Any, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(apply_lora(make_net(), config=CONFIG), mesh["tp"])
    shard_blocks(nn.ModuleDict({"net": model}), mesh["dp"], pull_frozen=True)
    average(model, mesh["dp"].get_group())
    fill_adapters(model)
    return train(model, 3, dist.get_rank() // 2, 2)[1], train(alone(), 3)[1]
