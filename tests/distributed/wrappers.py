"""Every wrapper of torch, LoRA before and after it, and what has to hold against one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unmerge_lora
from lightning_lora.experimental.pull_frozen import average
from lightning_lora.layers import lora_layers
from lightning_lora.model.parallel import data_parallel_groups, replicated_parameters
from lightning_lora.strategies.fsdp2 import shard_blocks
from lightning_lora.utils.gradient_reducer import GradientReducer
from lightning_lora.utils.sharding import full_tensor
from tests.distributed.nets import CONFIG, Block, clean, fill_adapters, make_data, make_net, reference, same_on_all_ranks, train

PLAN = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}


def fsdp2(model: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_used(model: nn.Module) -> nn.Module:
    """Wrapped, and a forward pass has already run."""
    model = fsdp2(model)
    with torch.no_grad():
        model(make_data()[0])
    return model


def fsdp2_linears(model: nn.Module) -> nn.Module:
    """Every linear by itself, its weight whole from the forward pass to the backward pass, as FSDP2 leaves those in nothing else."""
    for layer in model.layers:
        for linear in (layer.q, layer.v, layer.fc1, layer.fc2):
            fully_shard(linear)
    return model


def fsdp2_pulled(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if not any(lora_layers(model)):
        model.requires_grad_(False)
    shard_blocks(nn.ModuleDict({"net": model}), mesh, pull_frozen=True)
    average(model, mesh.get_group())
    return model


def fsdp1(model: nn.Module, **kwargs: Any) -> nn.Module:
    ignored = replicated_parameters(model) if any("lora_" in name for name, _ in model.named_parameters()) else None
    kwargs = {"auto_wrap_policy": ModuleWrapPolicy({Block}), "ignored_states": ignored, **kwargs}
    wrapped = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"), **kwargs)
    if ignored:
        GradientReducer(ignored, data_parallel_groups(wrapped))
    return wrapped


def fsdp1_hybrid(model: nn.Module) -> nn.Module:
    """Shards over two processes, copied over two such pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    return fsdp1(model, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


def tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for layer in model.layers:
        parallelize_module(layer, mesh, PLAN)
    return model


def two_dimensional(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fsdp2(tensor_parallel(model, mesh["tp"]), mesh["dp"])


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "ddp": (DDP, True),
    "fsdp2": (fsdp2, True),
    "fsdp2 used": (fsdp2_used, True),
    "fsdp2 linears": (fsdp2_linears, True),
    "fsdp2 pulled": (fsdp2_pulled, True),
    "fsdp1": (fsdp1, True),
    "tp": (tensor_parallel, False),
    "2d": (two_dimensional, True),
    "fsdp1 hybrid": (fsdp1_hybrid, True),
}


BOTH = [("ddp", "before"), *((name, order) for name in ("fsdp2", "fsdp2 pulled", "fsdp1", "tp") for order in ("before", "after"))]


def wrapped_and_adapted(name: str, order: str, config: LoRAConfig = CONFIG) -> tuple[nn.Module, int, int]:
    """The model, and which part of the batch this rank has."""
    wrap, data_parallel = WRAPPERS[name]
    if order == "before":
        model = wrap(apply_lora(make_net(), config=config))
    else:
        torch.manual_seed(dist.get_rank())  # ranks draw different A: they have to be made the same
        model = apply_lora(wrap(make_net()), config=config)
    fill_adapters(model)
    rank, world = dist.get_rank(), dist.get_world_size()
    return (model, rank // 2, 2) if name == "2d" else (model, rank, world) if data_parallel else (model, 0, 1)


def check_training(name: str, order: str, config: LoRAConfig = CONFIG, made: tuple[nn.Module, int, int] | None = None) -> dict[str, float]:
    model, rank, world = made or wrapped_and_adapted(name, order, config)
    frozen = {n: full_tensor(p).clone() for n, p in model.named_parameters() if not p.requires_grad and "fsdp1" not in name}
    grads, adapters = train(model, 3, rank, world)
    wanted_grads, wanted = reference(config=config)
    assert grads.keys() == wanted_grads.keys()
    assert same_on_all_ranks(adapters)
    assert all(torch.equal(full_tensor(p), frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {
        "gradient": max((grads[n] - wanted_grads[n]).abs().max().item() for n in grads),
        "adapter": max((adapters[n] - wanted[n]).abs().max().item() for n in adapters),
    }


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Base weights, whole, as copies."""
    with FSDP.summon_full_params(model, writeback=False) if isinstance(model, FSDP) else nullcontext():
        return {clean(n): full_tensor(p).detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def check_merge(name: str, order: str, config: LoRAConfig = CONFIG, made: tuple[nn.Module, int, int] | None = None) -> dict[str, Any]:
    model, _, _ = made or wrapped_and_adapted(name, order, config)
    reference_model = apply_lora(make_net(), config=config)
    fill_adapters(reference_model)
    x = make_data()[0]
    base = weights_of(model)
    with torch.no_grad():
        wanted = reference_model(x)
        model(x)  # leaves FSDP2's root unsharded
        merge_lora(model)
        difference = (model(x) - wanted).abs().max().item()
        merge_lora(reference_model)
        weights = {n: p for n, p in reference_model.named_parameters() if "lora_" not in n}
        merged = weights_of(model)
        exact = max((merged[n] - weights[n]).abs().max().item() for n in weights)
        unmerge_lora(model)
        back = all(torch.equal(tensor, base[n]) for n, tensor in weights_of(model).items())
    return {"difference": difference, "exact": exact, "back": back}
