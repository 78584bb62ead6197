"""Quantized bases under DDP and FSDP2, before and after wrapping, against one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import LoRAConfig, apply_lora, export_merged, merge_lora, quantize_base
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.layers import lora_layers
from lightning_lora.quantization.formats import format_of
from lightning_lora.strategies import arrange
from lightning_lora.utils.sharding import is_sharded, reshard
from tests.distributed.nets import adapter_tensors, fill_adapters, same_on_all_ranks
from tests.distributed.runs import LitShared, fsdp1, model_parallel, run
from tests.layers.experts import tiny_qwen3_moe
from tests.quantized import inputs, packed_stack

CONFIG = LoRAConfig(rank=4, alpha=8, target_modules=["up", "down"])
SHARDS = ["nf4", "torchao-nf4", "fp8"]


def worst(mine: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest relative error."""
    assert mine.keys() == wanted.keys()
    return max(float((mine[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def shard(model: nn.Module) -> nn.Module:
    for part in (model.up, model.down):
        fully_shard(part)
    return fully_shard(model)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model(x).square().mean().backward()
    return adapter_tensors(model, lambda p: p.grad)


def compare(how: str, order: str, device: str = "cpu", dtype: torch.dtype = torch.float32, rows: int = 8) -> tuple[float, bool]:
    """Largest error of the gradients, and whether the packed weights are in pieces."""
    base = packed_stack(how, dtype).train().to(device)
    if order == "ddp":
        arrange(DDPStrategy(), apply_lora(base, CONFIG))  # type: ignore[arg-type]
        model: nn.Module = DistributedDataParallel(base)
    else:
        model = shard(apply_lora(base, CONFIG)) if order == "before" else apply_lora(shard(base), CONFIG)
    alone = apply_lora(packed_stack(how, dtype).train().to(device), CONFIG)
    for each in (model, alone):
        fill_adapters(each)
    x = inputs(rows).to(device, dtype)
    for _ in range(2):  # the second time from weights that were sharded again in between
        for parameter in (*model.parameters(), *alone.parameters()):
            parameter.grad = None
        mine, wanted = gradients(model, x.chunk(dist.get_world_size())[dist.get_rank()]), gradients(alone, x)
        assert mine.keys() == wanted.keys() and len(mine) == 4
    reshard(model)
    return worst(mine, wanted), all(is_sharded(layer.weight) and format_of(layer) is not None for _, layer in lora_layers(model))


@pytest.mark.parametrize("how", SHARDS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_gradients_under_fsdp2(pool: Any, how: str, order: str) -> None:
    for error, in_pieces in pool.run(compare, how, order):
        assert error < 1e-6 and in_pieces


def test_gradients_of_torchaos_nf4_under_ddp(pool: Any) -> None:
    """DDP would broadcast the packed weights, which this one does not know how."""
    assert all(error < 1e-6 for error, _ in pool.run(compare, "torchao-nf4", "ddp"))


EXPERTS = LoRAConfig(rank=2, alpha=4, target_modules=["experts"])  # FSDP2 wants one dtype for what trains in a block


def compare_experts(how: str, order: str) -> tuple[float, bool]:
    """As :func:`compare`, for packed experts; computed in float64, with adapters in fp32."""

    def sharded(model: Any) -> Any:
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    def make() -> Any:
        return quantize_base(tiny_qwen3_moe(torch.float64), how, targets=["experts"]).train()

    base, alone, ids = make(), apply_lora(make(), EXPERTS), torch.arange(32).reshape(4, 8)
    if order == "ddp":
        arrange(DDPStrategy(), apply_lora(base, EXPERTS))  # type: ignore[arg-type]
        model: nn.Module = DistributedDataParallel(base)
    else:
        model = sharded(apply_lora(base, EXPERTS)) if order == "before" else apply_lora(sharded(base), EXPERTS)
    for each in (model, alone):
        fill_adapters(each)
    for _ in range(2):
        for each, batch in ((model, ids.chunk(dist.get_world_size())[dist.get_rank()]), (alone, ids)):
            each.zero_grad()
            each(batch).logits.square().mean().backward()
    mine, wanted = (adapter_tensors(each, lambda p: p.grad) for each in (model, alone))
    assert len(mine) == 8 and base_identity(base) == base_identity(alone)
    reshard(model)
    codes = [layer.get_submodule("mlp.experts").down_proj for layer in base.model.layers]
    if order == "ddp":
        merge_lora(model, quantized="dequantize")
    else:
        with pytest.raises(ValueError, match=r"experts' cannot be merged: gate_up_proj: its quantized weight is sharded: save the adapter"):
            merge_lora(model, quantized="dequantize")
    return worst(mine, wanted), all(is_sharded(code) for code in codes)


@pytest.mark.parametrize("how", ["fp8", "nf4"])
@pytest.mark.parametrize("order", ["ddp", "before", "after"])
def test_gradients_of_packed_experts(pool: Any, how: str, order: str) -> None:
    for error, in_pieces in pool.run(compare_experts, how, order):
        assert error < 1e-5 and in_pieces == (order != "ddp")


def merge_sharded(folder: str) -> None:
    model = shard(apply_lora(packed_stack("nf4"), CONFIG))
    with pytest.raises(ValueError, match=r"'up' cannot be merged: its quantized weight is sharded: save the adapter"):
        merge_lora(model, quantized="dequantize")
    with pytest.raises(ValueError, match=r"'up' cannot be exported: its quantized weight is sharded"):
        export_merged(model, folder)


def test_a_sharded_quantized_weight_is_not_merged(pool: Any, tmp_path: Path) -> None:
    pool.run(merge_sharded, str(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process's run, the half of it, and the checkpoint of the half."""

    @functools.cache
    def found(how: str) -> tuple[dict[str, Any], dict[str, Any], str]:
        folder = tmp_path_factory.mktemp("whole")
        first = run("single", str(folder), epochs=1, save=True, quantize=how)
        return run("single", str(folder), quantize=how), first, str(folder / "last.ckpt")

    return found


@pytest.mark.parametrize(
    "how, name",
    [
        ("nf4", "ddp"),
        ("torchao-int8", "ddp"),
        ("nf4", "lora_fsdp2"),
        ("nf4", "lora_fsdp2 pulled"),
        ("nf4", "fsdp2 DCP"),
        ("fp8", "ddp"),
        ("fp8", "lora_fsdp2"),
        ("fp8", "lora_fsdp2 pulled"),
    ],
)
def test_a_lightning_run_is_that_of_one_process(pool: Any, whole: Any, how: str, name: str, tmp_path: Path) -> None:
    """Losses and adapters, checkpoints without a base tensor, and a resume from what one process wrote."""
    alone, first, ckpt = whole(how)
    for result in pool.run(spread, name, str(tmp_path / "spread"), how):
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert worst(result["adapters"], alone["adapters"]) < 1e-4
        assert all(".lora_" in saved for saved in result["saved"]["names"])
    assert first["losses"] == alone["losses"][: len(first["losses"])]
    if "lora_fsdp2" in name:
        resumed = pool.run(spread, name, str(tmp_path / "resumed"), how, ckpt)
        assert worst(resumed[0]["adapters"], alone["adapters"]) < 1e-4


def spread(name: str, folder: str, how: str, ckpt: str | None = None) -> dict[str, Any]:
    result = run(name, folder, ckpt=ckpt, save=ckpt is None, quantize=how)
    assert same_on_all_ranks(result["adapters"])
    return result


def refusals() -> list[str]:
    said = []
    for strategy, how in ((fsdp1(), "nf4"), (model_parallel(), "int8"), (model_parallel(), "torchao-int8")):
        module = LitShared(late=True)
        module.net = apply_lora(packed_stack(how), CONFIG)
        with pytest.raises(ValueError) as error:
            arrange(strategy, module)
        said.append(str(error.value))
    return said


def test_what_cannot_be_sharded_is_named(pool: Any) -> None:
    flat, int8, ao = pool.run(refusals)[0]
    assert "flattens a block into one parameter, and 'net.up' is quantized: use strategy='lora_fsdp2'" in flat
    assert (
        "cannot shard 'net.up' (LoRALinear8bitLt), whose 8-bit weight cannot be split: use quantize='nf4', 'torchao-nf4' or 'fp8'" in int8
    )
    assert "cannot shard 'net.up' (LoRALinear)" in ao
