"""Slices of fused projections under data-parallel wrappers, against one process; tensor parallelism refuses them by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unmerge_lora
from tests.distributed.nets import adapter_tensors, fill_adapters
from tests.distributed.wrappers import WRAPPERS, weights_of
from tests.layers.fused import build

CONFIG = LoRAConfig(rank=2, alpha=4, target_modules=["q_proj", "v_proj", "up_proj"])


def make() -> Any:
    with torch.random.fork_rng():
        model = build("phi3").float().model
    model.config.use_cache = False
    return model


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model(ids).last_hidden_state.square().mean().backward()
    return adapter_tensors(model, lambda p: p.grad)


def check(name: str, order: str) -> dict[str, Any]:
    wrap = WRAPPERS[name][0]
    model = wrap(apply_lora(make(), config=CONFIG)) if order == "before" else apply_lora(wrap(make()), config=CONFIG)
    alone = apply_lora(make(), config=CONFIG)
    for each in (model, alone):
        fill_adapters(each)
    ids = torch.arange(32).reshape(4, 8) % 16 + 3
    mine, wanted = gradients(model, ids.chunk(dist.get_world_size())[dist.get_rank()]), gradients(alone, ids)
    assert mine.keys() == wanted.keys() and len(mine) == 8
    size = max(gradient.abs().max().item() for gradient in wanted.values())
    base = weights_of(model)
    with torch.no_grad():
        merged = (merge_lora(model)(ids).last_hidden_state - alone(ids).last_hidden_state).abs().max().item()
    unmerge_lora(model)
    back = all(torch.equal(tensor, base[n]) for n, tensor in weights_of(model).items())
    return {"gradient": max((mine[n] - wanted[n]).abs().max().item() for n in wanted) / size, "merged": merged, "back": back}


@pytest.mark.parametrize(("name", "order"), [("ddp", "before"), ("fsdp2", "before"), ("fsdp2", "after")])
def test_data_parallel(pool: Any, name: str, order: str) -> None:
    for result in pool.run(check, name, order):
        assert result["gradient"] < 1e-5 and result["merged"] < 1e-4 and result["back"], result


def refused() -> None:
    model = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"layers.*.self_attn.qkv_proj": ColwiseParallel()})
    with pytest.raises(
        ValueError, match=r"self_attn.qkv_proj': slices of a fused projection on a tensor-parallel base .*are not supported"
    ):
        apply_lora(model, config=CONFIG)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_tensor_parallel_is_refused(pool: Any) -> None:
    pool.run(refused)
