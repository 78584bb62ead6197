"""What the processes of ``multi_gpu.py`` do: put a model under a strategy, no rank of which ever has it whole, and take steps."""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import multi_gpu_public as public
import torch
import torch.distributed as dist
from multi_gpu_meters import Traffic, profiled
from multi_gpu_models import MODELS, SHAPES, empty_model, fill, fill_all, ours, peft
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule


def work(rank: int, world: int, meeting: str, pipe: Any, cpu: bool, variables: dict[str, str]) -> None:
    """A process with some environment variables: functions come through the pipe, what they return goes back."""
    os.environ.update(variables)
    warnings.simplefilter("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ.update(environment, WORLD_SIZE=str(world))
    if cpu:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    else:
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", init_method=meeting, rank=rank, world_size=world, device_id=torch.device("cuda", rank))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the parent is gone
            return
        os.environ.update(environment, WORLD_SIZE=str(world))  # Lightning's teardown removes some of these
        try:
            pipe.send((True, function(*args)))
        except Exception as error:  # a row of the table says it, the log where
            traceback.print_exc()
            pipe.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))


# Strategies: (meta model, what to do to it, device, mesh of all processes) → a model that runs.

Adapt = Callable[[nn.Module], nn.Module]


def one(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    return fill_all(adapt(model), device)


def ddp(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    model = fill_all(adapt(model), device)
    if not any(p.requires_grad for p in model.parameters()):
        return model  # DDP refuses a model that has nothing to reduce
    return nn.parallel.DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device.index])


def fsdp2(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    return shard(adapt(model), mesh_of(device)["dp"], device)


def fsdp2_kept(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    return shard(adapt(model), mesh_of(device)["dp"], device, reshard_after_forward=False)


def fsdp2_pulled(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    return shard(adapt(model), mesh_of(device)["dp"], device, pull_frozen=True)


def fsdp2_pulled_kept(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    return shard(adapt(model), mesh_of(device)["dp"], device, pull_frozen=True, reshard_after_forward=False)


def fsdp2_public(model: nn.Module, adapt: Adapt, device: torch.device, kept: bool = False, registered: bool = True) -> nn.Module:
    fill_here = functools.partial(fill_all, device=device)
    return public.shard(adapt(model), mesh_of(device)["dp"], fill_here, kept=kept, registered=registered)


def fsdp2_after(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    return adapt(shard(model, mesh_of(device)["dp"], device))


def fsdp1(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from lightning_lora.model.parallel import data_parallel_groups, replicated_parameters
    from lightning_lora.utils.blocks import repeated_blocks
    from lightning_lora.utils.gradient_reducer import GradientReducer

    model = adapt(model)
    policy: Any = ModuleWrapPolicy({type(repeated_blocks(model)[0][1])})
    ignored: list[nn.Parameter] = []
    if adapt is peft:  # PEFT's own way: a unit for every adapter, since one flat parameter cannot mix dtypes
        from peft.utils.other import fsdp_auto_wrap_policy

        policy = fsdp_auto_wrap_policy(model)
    elif adapt is ours:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:  # FSDP1 materialises only what it manages
                    module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device=device)))
        ignored = replicated_parameters(model)
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        use_orig_params=True,
        device_id=device,
        ignored_states=ignored or None,
        param_init_fn=lambda module: fill(module, device),
    )
    if ignored:
        GradientReducer(ignored, data_parallel_groups(wrapped))
    return wrapped


def tp(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    return fill_all(split(adapt(model), mesh_of(device, dist.get_world_size())["tp"]), device)


def tp_after(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    return adapt(fill_all(split(model, mesh_of(device, dist.get_world_size())["tp"]), device))


def tp_fsdp2(model: nn.Module, adapt: Adapt, device: torch.device) -> nn.Module:
    mesh = mesh_of(device, tensor_size("tp x fsdp2"))
    return shard(split(adapt(model), mesh["tp"]), mesh["dp"], device)


STRATEGIES: dict[str, Callable[[nn.Module, Adapt, torch.device], nn.Module]] = {
    "one": one,
    "apart": one,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2 after": fsdp2_after,
    "fsdp2 kept": fsdp2_kept,
    "fsdp2 public": fsdp2_public,
    "fsdp2 public kept": functools.partial(fsdp2_public, kept=True),
    "fsdp2 public nccl": functools.partial(fsdp2_public, registered=False),
    "fsdp2 pulled": fsdp2_pulled,
    "fsdp2 pulled kept": fsdp2_pulled_kept,
    "fsdp1": fsdp1,
    "tp": tp,
    "tp after": tp_after,
    "tp x fsdp2": tp_fsdp2,
}

# Strategies whose processes need environment variables: NCCL reads them once.
VARIABLES = {name: public.POLICY for name in ("fsdp2 public", "fsdp2 public kept")}


def tensor_size(strategy: str) -> int:
    """How many processes share each layer."""
    world = dist.get_world_size()
    return {"tp": world, "tp after": world, "tp x fsdp2": 2 - world % 2}.get(strategy, 1)


@functools.cache  # a mesh has process groups of its own
def mesh_of(device: torch.device, tensor: int = 1) -> DeviceMesh:
    return init_device_mesh(device.type, (dist.get_world_size() // tensor, tensor), mesh_dim_names=("dp", "tp"))


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device, **how: bool) -> nn.Module:
    """FSDP2 block by block as ``lora_fsdp2`` has it, then this rank's pieces materialised."""
    from lightning_lora.strategies.fsdp2 import shard_blocks

    shard_blocks(nn.ModuleDict({"net": model}), mesh, **how)
    fill_all(model, device)
    if how.get("pull_frozen"):
        from lightning_lora.experimental.pull_frozen import average

        average(model, mesh.get_group())
    return model


def nf4(model: nn.Module, device: torch.device, pull_frozen: bool) -> nn.Module:
    """The base in 4 bits under FSDP2, adapters sharded with it: a block at a time is made, quantized, adapted and cut."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch.distributed.fsdp import fully_shard

    from lightning_lora.experimental.pull_frozen import average, pull
    from lightning_lora.utils.blocks import repeated_blocks

    mesh = mesh_of(device)["dp"]
    blocks = [block for _, block in repeated_blocks(model)]
    for block in blocks:
        for name, linear in [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]:
            fill(linear, device)
            sizes = (linear.in_features, linear.out_features)
            packed = Linear4bit(*sizes, False, torch.bfloat16, quant_type="nf4", device="meta")
            # Stored as bf16 numbers, so that FSDP may cut it; moving it is what quantizes it.
            stored = {"quant_type": "nf4", "quant_storage": torch.bfloat16, "module": packed}
            packed.weight = Params4bit(linear.weight.data, requires_grad=False, **stored)
            block.set_submodule(name, packed.to(device))
        ours(block)
        fully_shard(block, mesh=mesh, ignored_params={p for p in block.parameters() if p.requires_grad and pull_frozen})
    for module in model.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            fill(module, device)
    model.get_input_embeddings().requires_grad_(False)
    for parameter in (*model.lm_head.parameters(), *model.model.norm.parameters()):
        parameter.requires_grad_(False)
    fully_shard(model, mesh=mesh)
    if pull_frozen:
        pull(model, blocks)
        average(model, mesh.get_group())
    return model


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallelism by the model's own plan, as ``lora_fsdp2`` has it."""
    from lightning_lora.strategies.fsdp2 import tensor_parallel

    tensor_parallel(model.get_base_model() if hasattr(model, "get_base_model") else model, mesh)  # PEFT's wrapper has names of its own
    return model


def device_here(options: argparse.Namespace) -> torch.device:
    return torch.device("cpu") if options.cpu else torch.device("cuda", torch.cuda.current_device())


def built(strategy: str, model: str, options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """A model under a strategy, and AdamW over what trains in it."""
    device = device_here(options)
    gc.collect()  # models are parts of cycles: an earlier one would count as this one's memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        empty = empty_model(options)
    wrapped = nf4(empty, device, options.pull_frozen) if model == "nf4" else STRATEGIES[strategy](empty, MODELS[model], device)
    if options.compile:
        from lightning_lora.model.compile import compile_layers

        torch._dynamo.reset()
        compile_layers(wrapped)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    return wrapped, torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda") if trained else None


def shared_gib(model: nn.Module) -> float:
    """What lies in memory that GPUs share, which torch's allocator does not count."""
    from lightning_lora.utils.torch_private_parallel import fsdp2_group

    groups = [fsdp2_group(module) for module in model.modules() if isinstance(module, FSDPModule)]
    return sum(param._sharded_param_data.nbytes for group in groups for param in getattr(group, "sources", None) or ()) / 2**30


def measure(strategy: str, model: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Step time, peak memory and traffic on this rank; None on ranks that have no part in it."""
    if strategy == "one" and dist.get_rank():
        return None
    device = device_here(options)
    peak = (lambda: torch.cuda.max_memory_allocated() / 2**30) if device.type == "cuda" else lambda: 0.0
    wrapped, optimizer = built(strategy, model, options)
    build_gib, shared = peak(), tensor_size(strategy)
    generator = torch.Generator().manual_seed(dist.get_rank() // shared)  # who shares layers shares the batch
    ids = torch.randint(0, SHAPES[options.shape][-1], (options.rows * shared, options.length), generator=generator).to(device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: torch.Tensor = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    times, launched = [], []
    for index in range(options.steps + 3):
        if index == 3 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = step()
        launched.append(time.perf_counter() - started)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak_gib = peak() + shared_gib(wrapped)
    shares, kernels = profiled(step) if options.profile else ({}, [])
    with Traffic() as traffic:
        step()
    tokens = options.rows * options.length * (1 if strategy == "one" else dist.get_world_size())
    found = {"ms": statistics.median(times[3:]) * 1e3, "tokens": tokens, "peak_gib": peak_gib, "build_gib": build_gib, "loss": loss.item()}
    found["launched_ms"] = statistics.median(launched[3:]) * 1e3
    return {**found, "traffic": traffic.found, "profile": shares, "kernels": kernels}
