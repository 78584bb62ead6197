"""The kinds other than linear under data-parallel wrappers, before and after wrapping, against one process."""

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
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unmerge_lora
from lightning_lora.utils.sharding import is_sharded
from tests.distributed.nets import adapter_tensors, fill_adapters
from tests.distributed.wrappers import WRAPPERS, fsdp1, weights_of
from tests.layers.experts import tiny_qwen3_moe
from tests.sweep.archs import build

KINDS = LoRAConfig(rank=4, alpha=8, target_modules=["embed", "conv", "linear"])


class Kinds(nn.Module):
    """Embedding, convolution and Hugging Face's Conv1D; the wrappers look for ``layers``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv1d(8, 8, 3, padding=1), "linear": Conv1D(8, 8)}) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)  # (N, T, 8)
        for layer in self.layers:
            x = x + layer["linear"](layer["conv"](x.transpose(1, 2)).transpose(1, 2).contiguous()).tanh()
        return x


def make() -> Kinds:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Kinds()


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model(ids).square().mean().backward()
    return adapter_tensors(model, lambda p: p.grad)


def check(name: str, order: str) -> dict[str, Any]:
    wrap = {"fsdp2": root_only, "fsdp1": fsdp1_root, "tp": tensor_parallel, "tp rowwise": rowwise}.get(name) or WRAPPERS[name][0]
    model = wrap(apply_lora(make(), config=KINDS)) if order == "before" else apply_lora(wrap(make()), config=KINDS)
    alone = apply_lora(make(), config=KINDS)
    for each in (model, alone):
        fill_adapters(each)
    ids = torch.arange(32).reshape(4, 8) % 16
    part = ids if name.startswith("tp") else ids.chunk(dist.get_world_size())[dist.get_rank()]
    mine, wanted = gradients(model, part), gradients(alone, ids)
    assert mine.keys() == wanted.keys() and len(mine) == 10
    assert not name.startswith("tp") or is_sharded(model.embed.weight)
    base = weights_of(model)
    with torch.no_grad():
        merged = (merge_lora(model)(ids) - alone(ids)).abs().max().item()
    unmerge_lora(model)
    back = all(torch.equal(tensor, base[n]) for n, tensor in weights_of(model).items())
    return {"gradient": max((mine[n] - wanted[n]).abs().max().item() for n in wanted), "merged": merged, "back": back}


def root_only(model: nn.Module) -> nn.Module:
    """The blocks here are called part by part, so FSDP2's hooks belong on the whole."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp1_root(model: nn.Module) -> nn.Module:
    return fsdp1(model, auto_wrap_policy=None)


def tensor_parallel(model: nn.Module) -> nn.Module:
    """The embedding split by columns; torch has no style for the other kinds, which stay whole beside it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize_module(model, mesh, {"embed": ColwiseParallel(output_layouts=Replicate())})


def rowwise(model: nn.Module) -> nn.Module:
    """The embedding split by rows, its vocabulary."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize_module(model, mesh, {"embed": RowwiseParallel(input_layouts=Replicate())})


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("ddp", "before"),
        ("fsdp2", "before"),
        ("fsdp2", "after"),
        ("fsdp1", "before"),
        ("fsdp1", "after"),
        ("tp", "before"),
        ("tp rowwise", "before"),
    ],
)
def test_embedding_and_convolution(pool: Any, name: str, order: str) -> None:
    for result in pool.run(check, name, order):
        assert result["gradient"] < 1e-6 and result["merged"] < 1e-5 and result["back"], result


def refused_after_tensor_parallel() -> str:
    model = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"embed": ColwiseParallel()})
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"'embed': LoRAEmbedding on a tensor-parallel base .* apply LoRA before parallelizing") as error:
        apply_lora(model, config=LoRAConfig(target_modules=["embed"]))
    assert [type(module) for module in model.modules()] == classes and not any("lora_" in name for name, _ in model.named_parameters())
    return str(error.value)


def test_after_tensor_parallelism_they_are_refused_by_name(pool: Any) -> None:
    assert all(pool.run(refused_after_tensor_parallel))


# A module with several weights.


# Model → in float64 (fp32 sums of a batch and of its halves differ by 1e-5 in one process too), targets, blocks, experts in a block.
MIXTURES = {
    "qwen3_moe": (lambda: tiny_qwen3_moe(torch.float64), ["experts", "q_proj"], "model.layers", "mlp.experts"),
    "dbrx": (lambda: build("dbrx")[0].double(), ["experts.mlp", "out_proj"], "transformer.blocks", "ffn.experts"),
}


def check_experts(name: str, order: str, shared: bool, mixture: str) -> dict[str, Any]:
    """Gradients, merge and unmerge of two processes are those of one."""
    options = {"experts": {"shared_outer": shared}}
    make, targets, blocks, experts = MIXTURES[mixture]
    config = LoRAConfig(rank=2, alpha=4, target_modules=targets, kind_options=options)
    ids = torch.arange(32).reshape(4, 8)
    model, alone = make(), apply_lora(make(), config=config)
    model = (
        wrap_experts(apply_lora(model, config=config), name, blocks, experts)
        if order == "before"
        else apply_lora(wrap_experts(model, name, blocks, experts), config=config)
    )
    for each in (model, alone):
        fill_adapters(each)
    assert name == "ddp" or any(is_sharded(p) for p in model.get_submodule(f"{blocks}.0.{experts}").parameters())
    part = ids.chunk(dist.get_world_size())[dist.get_rank()]
    for each, batch in ((model, part), (alone, ids)):
        each(batch).logits.square().mean().backward()
    mine, wanted = adapter_tensors(model, lambda p: p.grad), adapter_tensors(alone, lambda p: p.grad)
    assert mine.keys() == wanted.keys() and len(mine) == {"qwen3_moe": 12, "dbrx": 16}[mixture]
    base = weights_of(model)
    with torch.no_grad():
        merged = (merge_lora(model)(part).logits - alone(part).logits).abs().max().item()
    unmerge_lora(model)
    back = all(torch.equal(tensor, base[n]) for n, tensor in weights_of(model).items())
    # Each beside its own size: the experts' are a hundredth of q_proj's and smaller.
    gradient = max(((mine[n] - wanted[n]).abs().max() / wanted[n].abs().max()).item() for n in wanted)
    return {"gradient": gradient, "merged": merged, "back": back}


def wrap_experts(model: nn.Module, name: str, blocks: str, experts: str) -> nn.Module:
    if name == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_submodule(blocks):
        fully_shard(layer.get_submodule(experts), mesh=mesh)  # by themselves, as large ones are
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("name", "order"), [("ddp", "before"), ("fsdp2", "before"), ("fsdp2", "after")])
def test_experts(pool: Any, name: str, order: str, shared: bool, mixture: str) -> None:
    for result in pool.run(check_experts, name, order, shared, mixture):
        assert result["gradient"] < 1e-9 and result["merged"] < 1e-9 and result["back"], result
