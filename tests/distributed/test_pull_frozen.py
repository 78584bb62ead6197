"""``pull_frozen``: what is frozen is read from the other ranks' memory, as FSDP2 would have gathered it, whatever happens to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_lora import apply_lora
from lightning_lora.experimental.pull_frozen import average, release
from lightning_lora.strategies.fsdp2 import shard_blocks
from lightning_lora.utils.sharding import full_tensor, local_tensor, reshard
from tests.distributed.nets import CONFIG, Block, fill_adapters, make_data, train
from tests.distributed.pool import Pool
from tests.distributed.pulled import alone, change, group_of, losses, resident, sharded, step


def traffic() -> dict[str, int]:
    model = sharded()
    step(model)
    with CommDebugMode() as mode:
        step(model)
    return {str(operation).split(".")[-1]: count for operation, count in mode.get_comm_counts().items()}


def test_a_step_gathers_nothing(pool: Any) -> None:
    for counts in pool.run(traffic):
        assert counts == {"allreduce_": 3}  # a barrier before and after the forward pass, and the gradients


def memory() -> list[set[str]]:
    model, found = sharded(), []
    shards = [parameter for name, parameter in model.named_parameters() if "lora_" not in name]
    assert all(isinstance(shard, DTensor) for shard in shards)
    model.layers[0].fc2.register_forward_hook(lambda *_: found.append(resident(model.layers[0])))
    step(model)
    found += [resident(model.layers[0]), resident(model)]
    assert [p for name, p in model.named_parameters() if "lora_" not in name] == shards  # between steps the model shows its shards
    reshard(model)
    return [*found, resident(model.layers[0]), resident(model)]


def test_what_is_resident_when(pool: Any) -> None:
    for in_forward, block, outside, *freed in pool.run(memory):
        assert in_forward == outside == {"small", "large"}
        assert block == {"small"}
        assert freed == [set(), set()]


def writes(how: str) -> list[list[float]]:
    """Losses of a model whose frozen weights are written to between steps, and those of one process."""
    return [losses(model, how, [False, True, how == "merged"]) for model in (sharded(), alone())]


@pytest.mark.parametrize("how", ["written", "assigned", "loaded", "merged"])
def test_what_is_written_is_what_others_read(pool: Any, how: str) -> None:
    for mine, wanted in pool.run(writes, how):
        assert mine == pytest.approx(wanted, abs=1e-6)
        assert how == "merged" or len({round(loss, 4) for loss in wanted}) == 3


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(8, width), nn.ModuleList(Block(width) for _ in range(5)), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def with_and_without(device: str) -> list[tuple[list[torch.Tensor], dict[str, torch.Tensor]]]:
    """Losses and adapters of FSDP2 as it is and of one that pulls; frozen weights are written to between the steps."""
    found = []
    rank, world = dist.get_rank(), dist.get_world_size()
    rows, width = (16, 32) if device == "cpu" else (4096, 1024)  # a block takes a GPU longer than its launch
    x, y = (part.chunk(world)[rank].to(device) for part in make_data(rows * world))
    for pulls in (False, True):
        torch.manual_seed(5)
        model = apply_lora(Wide(width), config=CONFIG)
        fill_adapters(model)
        mesh = init_device_mesh(device, (world,))
        shard_blocks(nn.ModuleDict({"net": model}), mesh, pull_frozen=pulls)
        model.to(device)
        if pulls:
            average(model, mesh.get_group())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(6):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            with torch.no_grad():
                for parameter in model.parameters():
                    if not parameter.requires_grad:
                        local_tensor(parameter).mul_(1.01)
        found.append((losses, {name: full_tensor(p.detach()).cpu() for name, p in model.named_parameters() if p.requires_grad}))
    return found


def test_trains_as_fsdp2_does(pool: Any) -> None:
    for plain, pulled in pool.run(with_and_without, "cpu"):
        torch.testing.assert_close(pulled, plain, rtol=0, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that reach each other's memory")
def test_trains_as_fsdp2_does_on_gpus() -> None:
    gpus = Pool(2, "cuda")
    try:
        for plain, pulled in gpus.run(with_and_without, "cuda"):
            torch.testing.assert_close(pulled, plain, rtol=1e-5, atol=1e-5)
    finally:
        gpus.close()


def moved(releases: bool) -> tuple[list[bool], list[torch.Tensor]]:
    """Losses of a model that is put elsewhere and written to there, as Lightning does after ``fit``, and of one that is not moved."""
    losses, gone = [], [True]
    for moves in (True, False):
        model = sharded()
        step(model)
        if moves:
            reshard(model)
            model._apply(torch.clone)
            if releases:
                release(model)
                gone = [group_of(unit).sources is None and not resident(unit) for unit in (model, *model.layers)]
                model._apply(torch.clone)
        change(model, "written", 0)
        losses.append(step(model))
    return gone, losses


@pytest.mark.parametrize("releases", [True, False])
def test_a_model_that_moves_is_shared_anew(pool: Any, releases: bool) -> None:
    for gone, (mine, wanted) in pool.run(moved, releases):
        assert all(gone) and mine == wanted


def inference_first() -> tuple[Any, Any]:
    model = sharded()
    with torch.inference_mode():
        model(make_data()[0])
    return train(model, 2, dist.get_rank(), dist.get_world_size())[1], train(alone(), 2)[1]


def test_training_after_inference(pool: Any) -> None:
    for mine, wanted in pool.run(inference_first):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)
