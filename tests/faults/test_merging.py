"""Merging, and bases that are quantized, tied, shared or not there yet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRALinear,
    apply_lora,
    find_targets,
    get_lora_parameters,
    load_adapter,
    merge_lora,
    merge_report,
    quantize_base,
    unmerge_lora,
)
from lightning_lora.layers import LoRALayer
from tests.conftest import DTYPES, as_bits, same_bits, snapshot
from tests.faults.adapter_files import as_peft
from tests.faults.kit import CONFIG, IDS, Int8Linear, adapted, net, projections, refused, row


@row(46)
def test_merge_twice() -> None:
    model = merge_lora(adapted())
    before = snapshot(model)
    assert merge_lora(model) is model
    assert snapshot(model) == before


@pytest.mark.parametrize("size", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@row(47)
def test_unmerge_is_exact(dtype: torch.dtype, size: float) -> None:
    model = adapted(dtype=dtype, std=size)
    before, y = snapshot(model), model(IDS)
    merge_lora(model)
    assert all(
        not same_bits(layer.weight, base.weight) for layer, base in zip(projections(model), projections(net(dtype=dtype)), strict=True)
    )
    unmerge_lora(model)
    after = snapshot(model)
    assert after["bits"] == before["bits"] and after["parameters"] == before["parameters"]
    assert torch.equal(model(IDS), y)


@row(47)
def test_an_adapter_that_changed_since_is_refused() -> None:
    model = merge_lora(adapted())
    with torch.no_grad():
        model.layers[0].q_proj.lora_A.add_(0.01)
    with refused("'layers.0.q_proj'", "cannot be unmerged", "changed since the merge", model=model):
        unmerge_lora(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@row(48)
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """The merged weight is the rounding of the exact sum, and the report says what that lost, layer by layer."""
    model = adapted(dtype=dtype, std=0.05)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}
    with torch.no_grad():
        exact = {name: x.weight.double() + x.scaling * x.lora_B.double() @ x.lora_A.double() for name, x in layers.items()}
    base = {name: model.get_submodule(name).weight.double() for name in exact}
    merge_lora(model)
    lost = merge_report(model)
    assert lost.keys() == exact.keys()
    for name, sum_ in exact.items():
        merged = model.get_submodule(name).weight
        assert merged.dtype == dtype
        assert torch.equal(merged, sum_.float().to(dtype))
        delta = sum_ - base[name]
        assert lost[name] == pytest.approx(float((merged.double() - sum_).norm() / delta.norm()), rel=1e-3)
        assert 0 < lost[name] < 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@row(49)
def test_an_adapter_that_is_not_finite(value: float) -> None:
    model = adapted()
    with torch.no_grad():
        model.layers[1].v_proj.lora_B[3, 1] = value  # in the last layer: none before it may have been merged
    with refused("'layers.1.v_proj'", "lora_B holds NaN or infinity", "load a sound adapter", model=model):
        merge_lora(model)
    layer = model.layers[1].v_proj
    with refused("NaN or infinity", model=layer):
        layer.merge_weights()


@row(50)
def test_a_quantized_base() -> None:
    """Stored in a way that is not known here, it is refused before anything is changed: an update added to its numbers would be lost."""
    model = net()
    model.layers[1].v_proj = Int8Linear(12)
    with refused("'layers.1.v_proj'", "stores its weight as torch.int8", "dequantize the base first", model=model):
        apply_lora(model, config=CONFIG)


@pytest.mark.parametrize("target", ["embed", "head"])
@row(51)
def test_tied_weights(target: str) -> None:
    other = {"embed": "head", "head": "embed"}[target]
    model = adapted(LoRAConfig(rank=2, target_modules=[target]), tied=True)
    y = model(IDS)
    with refused(f"{target}.weight is tied to {other}.weight", "untie=True", model=model):
        merge_lora(model)
    before = as_bits(model.get_submodule(other).weight)
    merge_lora(model, untie=True)
    assert model.embed.weight is not model.head.weight and torch.equal(as_bits(model.get_submodule(other).weight), before)
    torch.testing.assert_close(model(IDS), y, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert model.embed.weight is model.head.weight, "and tied again"
    assert torch.equal(model(IDS), y)


@row(52)
def test_a_module_with_two_parents() -> None:
    model = net()
    model.layers[1] = model.layers[0]
    apply_lora(model, config=CONFIG)
    assert model.layers[1].q_proj is model.layers[0].q_proj
    assert len(get_lora_parameters(model)) == 4, "two layers, one A and one B each"
    nn.init.normal_(model.layers[0].q_proj.lora_B)
    y = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), y, rtol=1e-4, atol=1e-5)  # merged once, not twice
    unmerge_lora(model)
    assert torch.equal(model(IDS), y)


@row(53)
def test_meta() -> None:
    """Adapters on a meta model start as they should once it is materialised."""
    with torch.device("meta"):
        model = net()
    apply_lora(model, config=CONFIG)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.load_state_dict(net().state_dict(), strict=False)
    layer = model.layers[0].q_proj
    assert 0 < layer.lora_A.abs().max() <= 12**-0.5 and not layer.lora_B.any()
    assert torch.equal(model(IDS), net()(IDS))


@row(53)
def test_lazy() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'0' \(torch.nn.modules.linear.LazyLinear\) is lazy .* run one forward pass"):
        apply_lora(model, config=LoRAConfig(target_modules=["0"]))
    assert type(model[0]) is nn.LazyLinear
    model(torch.ones(1, 3))
    assert type(apply_lora(model, config=LoRAConfig(rank=2, target_modules=["0"]))[0]) is LoRALinear


@row(53)
def test_lazy_beside_the_targets() -> None:
    """It is frozen, or trained in full, and has no shape for either."""
    model = nn.ModuleDict({"backbone": nn.Linear(3, 4), "head": nn.LazyLinear(1)})
    for saved in ([], ["head"]):
        with pytest.raises(ValueError, match=r"'head.weight' is lazy and has no shape yet: run one forward pass"):
            find_targets(model, LoRAConfig(rank=2, target_modules=["backbone"], modules_to_save=saved))
        with pytest.raises(ValueError, match=r"'head.weight' is lazy"):
            apply_lora(model, LoRAConfig(rank=2, target_modules=["backbone"], modules_to_save=saved))
    assert type(model["backbone"]) is nn.Linear and model["backbone"].weight.requires_grad


@row(53)
def test_meta_and_a_file(folder: Path) -> None:
    """The values are there after materialisation, or nothing was loaded and the error says so."""
    as_peft(folder)
    with torch.device("meta"):
        model = net()
    with refused("on the meta device", "give the model its weights"):
        load_adapter(model, folder)


def out_of_memory(*args: Any, **kwargs: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("quantized", [None, "dequantize"])
@row(50)
def test_a_merge_that_fails_half_way(monkeypatch: pytest.MonkeyPatch, quantized: Any) -> None:
    """Wholly or not at all, whatever a merge runs out of."""
    model = net(width=64)
    if quantized:
        quantize_base(model, "nf4")
    apply_lora(model, config=CONFIG)
    with torch.no_grad():
        for parameter in get_lora_parameters(model):
            parameter.normal_(std=0.2)
    model.eval()
    before, y = snapshot(model), model(IDS)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "norm", out_of_memory)
        merge_lora(model, quantized=quantized)
    assert torch.equal(model(IDS), y) and snapshot(model) == before
