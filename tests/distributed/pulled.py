"""Models sharded with ``pull_frozen``: one step, what is resident, losses while weights are written to."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_lora import LoRAConfig, apply_lora, merge_lora
from lightning_lora.experimental import pulling_group
from lightning_lora.experimental.pulling_group import PullingGroup
from lightning_lora.utils.sharding import local_shard, local_tensor
from tests.distributed.nets import CONFIG, fill_adapters, make_data, make_net
from tests.distributed.wrappers import fsdp2_pulled


def sharded(config: LoRAConfig = CONFIG, make: Any = make_net) -> Any:
    model = fsdp2_pulled(apply_lora(make(), config=config))
    fill_adapters(model)
    return model


def alone(config: LoRAConfig = CONFIG, make: Any = make_net) -> Any:
    model = apply_lora(make(), config=config)
    fill_adapters(model)
    return model


def group_of(unit: Any) -> PullingGroup:
    group = unit._get_fsdp_state()._fsdp_param_group
    assert type(group) is PullingGroup
    return group


def resident(unit: Any) -> set[str]:
    """The sizes of the parameters that are unsharded in memory."""
    full = [p for p in group_of(unit).fsdp_params if any(t.untyped_storage().size() for t in p.all_gather_outputs)]
    return {"large" if p.all_gather_outputs[0].nbytes >= pulling_group.SMALL else "small" for p in full}


def step(model: nn.Module) -> torch.Tensor:
    x, y = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in make_data())
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def losses(model: nn.Module, how: str, inference: list[bool], skips: tuple[set[int], ...] = ()) -> list[float]:
    """Of the global batch, pass after pass; after each the frozen weights are written to."""
    spread = hasattr(model, "unshard")
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    x, y = (part.chunk(world)[rank] for part in make_data())
    found = []
    for index, without_gradient in enumerate(inference):
        if skips:
            model.skip = skips[index]
        trains = not without_gradient and any(p.requires_grad for p in model.parameters())
        with torch.set_grad_enabled(trains):
            loss = F.cross_entropy(model(x), y)
        if trains:
            loss.backward()
        shared = loss.detach().clone()
        if spread:
            dist.all_reduce(shared)
        found.append(shared.item() / world)
        change(model, how, index)
    return found


@torch.no_grad()
def change(model: nn.Module, how: str, seed: int) -> None:
    reference = make_net().state_dict()
    values = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed + i)) * 0.3
        for i, (name, tensor) in enumerate(reference.items())
    }
    if how == "merged":
        if seed == 1:
            merge_lora(model)
        return
    if how == "loaded":  # FSDP2 has its hooks there
        mine = {
            name: DTensor.from_local(local_shard(values[name], p), p.device_mesh, p.placements) if isinstance(p, DTensor) else values[name]
            for name, p in model.state_dict().items()
            if name in values
        }
        model.load_state_dict(mine, strict=False, assign=seed == 1)
        return
    for name, parameter in model.named_parameters():
        if name in values:
            shard = local_shard(values[name], parameter)
            if how == "assigned" and isinstance(parameter, DTensor):
                parameter.copy_(DTensor.from_local(shard, parameter.device_mesh, parameter.placements))
            else:
                local_tensor(parameter).copy_(shard)
