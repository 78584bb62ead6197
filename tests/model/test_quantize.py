"""Packing the linears of a model, and adapters on what comes out: forward, gradients, merging each way (files: test_quantize_files.py)."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    find_targets,
    get_lora_parameters,
    merge_lora,
    merge_report,
    quantize_base,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.model.apply import trainable_parameters
from lightning_lora.quantization.formats import format_of
from tests.conftest import TinyModel, adapted, fill, same_bits, snapshot
from tests.model.quantizing import CONFIG, both_ways, each_format
from tests.quantized import BITSANDBYTES, Stack, inputs, packed_linear, packed_stack, plain_stack

BITS = {"nf4": 4.6, "int8": 9, "torchao-nf4": 4.6, "torchao-int8": 9, "fp8": 9}  # an entry; the scales come on top of 4 and 8
ERROR = {"nf4": 0.12, "int8": 0.01, "torchao-nf4": 0.12, "torchao-int8": 0.01, "fp8": 0.03}


@each_format
def test_the_weight_is_packed(how: str) -> None:
    """It takes the bits it should, unpacks to nearly what it was, and the layer multiplies with what it unpacks to."""
    plain, model = plain_stack(), packed_stack(how)
    layer = adapted(model, **CONFIG).up
    codes = format_of(layer).codes(layer)
    assert sum(code.nbytes for code in codes) * 8 / plain.up.weight.numel() < BITS[how] + 1  # torchao adds a table of 16 and zero points
    assert layer.base_weight().shape == (256, 128) and layer.base_weight().dtype == torch.float32
    assert 0 < (layer.base_weight() - plain.up.weight).norm() / plain.up.weight.norm() < ERROR[how]


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_the_definition(how: str, dtype: torch.dtype) -> None:
    """y = x·Wᵀ + b + s·x·Aᵀ·Bᵀ with W what the base unpacks to, in float64; and the gradients of x, A and B."""
    layer = fill(apply_lora(nn.Sequential(packed_linear(how, dtype)), LoRAConfig(rank=4, target_modules="all-linear")))[0]
    layer.train()
    x = inputs().to(dtype).requires_grad_()
    y = layer(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(g)
    exact = {name: t.detach().double().requires_grad_() for name, t in (("x", x), ("A", layer.lora_A), ("B", layer.lora_B))}
    wanted = F.linear(exact["x"], layer.base_weight().double(), layer.bias.double())
    wanted = wanted + layer.scaling * (exact["x"] @ exact["A"].T @ exact["B"].T)
    wanted.backward(g.double())
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    pairs = [(y, wanted), (x.grad, exact["x"].grad), (layer.lora_A.grad, exact["A"].grad), (layer.lora_B.grad, exact["B"].grad)]
    for mine, theirs in pairs:
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()
    assert layer.weight.grad is None


@each_format
@both_ways
def test_merging_is_a_choice_and_can_be_taken_back(how: str, quantized: Any) -> None:
    """Refused without the choice; with it the error is reported; the way back is bit for bit, and can be gone again."""
    model, x = adapted(packed_stack(how, torch.bfloat16), **CONFIG).train(), inputs().bfloat16()
    before, weight, classes = model(x), model.up.weight, (type(model.up), type(model.down))
    codes = [code.clone() for code in format_of(model.up).codes(model.up)]
    with pytest.raises(ValueError, match=r"'up' cannot be merged: its weight is quantized.*'dequantize'.*'requantize'"):
        merge_lora(model)
    assert not model.up.merged and torch.equal(model(x), before)
    exact = model.up.base_weight().double() + model.up.lora_delta().double()

    merge_lora(model, quantized=quantized)
    lost = merge_report(model)
    assert list(lost) == ["up", "down"]
    measured = (model.up.base_weight().double() - exact).norm() / model.up.lora_delta().double().norm()
    assert lost["up"] == pytest.approx(measured.item(), rel=1e-3)
    assert 0 < lost["up"] < (0.01 if quantized == "dequantize" else 0.3)
    assert (format_of(model.up) is None) == (quantized == "dequantize")
    assert type(model.up) is (LoRALinear if quantized == "dequantize" else classes[0])
    assert model.up.weight is not weight and not [key for key in model.state_dict() if "lora_" in key]
    assert (model(x) - before).norm() < (0.02 if quantized == "dequantize" else 0.35) * before.norm()
    assert merge_lora(model) is model  # a no-op on a merged model

    unmerge_lora(model)
    assert model.up.weight is weight and (type(model.up), type(model.down)) == classes
    assert all(same_bits(a, b) for a, b in zip(codes, format_of(model.up).codes(model.up), strict=True))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("way", "lost"), [("requantize", 0.78), ("dequantize", 0.017)])
def test_the_share_of_an_update_that_a_merge_loses(way: Any, lost: float) -> None:
    """As docs/family.md says: NF4, bf16, a weight of normal entries, and an update a tenth as large."""
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16))
    size = nn.init.normal_(model[0].weight, std=0.02).norm().item()
    (layer,) = apply_lora(quantize_base(model, "nf4"), LoRAConfig(target_modules="all-linear"))
    nn.init.normal_(layer.lora_B)
    layer.lora_B.data *= 0.1 * size / (layer.scaling * layer.lora_B @ layer.lora_A).norm()
    merge_lora(model, quantized=way)
    assert merge_report(model)["0"] == pytest.approx(lost, rel=0.03)


@each_format
def test_a_dequantized_merge_ends_as_a_plain_model(how: str) -> None:
    model = adapted(packed_stack(how), **CONFIG)
    x, before = inputs(), model.train()(inputs())
    unload_lora(merge_lora(model, quantized="dequantize", reversible=False), merged="keep")
    assert type(model.up) is type(model.down) is nn.Linear
    assert set(model.up.__dict__) <= set(nn.Linear(1, 1).__dict__) | {"_unpacked_digest", "_unpacked_dtype"}
    assert model.state_dict().keys() == plain_stack().state_dict().keys()
    assert torch.allclose(model(x), before, atol=1e-4)


@each_format
def test_without_a_way_back_unmerging_is_refused(how: str) -> None:
    model = merge_lora(adapted(packed_stack(how), **CONFIG), quantized="requantize", reversible=False)
    with pytest.raises(ValueError, match=r"'up' cannot be unmerged: no undo record was kept"):
        unmerge_lora(model)


@each_format
def test_an_evaluation_pass_changes_nothing(how: str) -> None:
    """bitsandbytes rewrites 4-bit weights for inference on some CPUs, lossy and without a backward: not under adapters."""
    model = adapted(packed_stack(how), **CONFIG).train()
    x, before = inputs(), model(inputs())
    with torch.no_grad():
        model.eval()(x)
    after = model.train()(x)
    assert torch.equal(after, before)
    after.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in get_lora_parameters(model))


def test_a_weight_rewritten_for_inference_is_refused() -> None:
    from bitsandbytes import functional

    model = packed_stack("nf4")
    if functional.has_avx512bf16():
        with torch.no_grad():
            model.eval().down(torch.randn(1, model.down.in_features))
    else:  # what that pass does to the weight on CPUs that have it
        weight = model.down.weight
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    before = dict(vars(model.up))
    with pytest.raises(ValueError, match=r"'down': an evaluation pass on the CPU rewrote its 4-bit weight.*apply LoRA first"):
        apply_lora(model, LoRAConfig(**CONFIG))
    assert vars(model.up) == before  # the layers before it are not prepared either


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_base_on_its_way_to_a_device_is_packed_when_adapters_come(how: str) -> None:
    """As users of bitsandbytes make one: the layer first, then its weights, then `.to(device)`."""
    import bitsandbytes

    nf4, int8 = bitsandbytes.nn.LinearNF4, functools.partial(bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False)
    plain, model = plain_stack(), plain_stack()
    model.up = {"nf4": nf4, "int8": int8}[how](128, 256)
    model.up.load_state_dict(plain.up.state_dict())
    assert format_of(model.up) is None
    adapted(model, **CONFIG)
    assert format_of(model.up) is not None
    assert (model.up.base_weight() - plain.up.weight).norm() / plain.up.weight.norm() < ERROR[how]


@each_format
def test_only_linears_that_were_asked_for_are_packed(how: str, make: Any) -> None:
    model = make(TinyModel)
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    parts = [name for name, module in model.named_modules() if type(module) is nn.Linear and "lm_head" not in name]
    assert parts
    small = {name: model.get_submodule(name).weight.numel() % 16384 for name in parts}
    if how == "torchao-nf4" and any(small.values()):
        with pytest.raises(
            ValueError, match=r"quantize='torchao-nf4': 'layers.0.*packs multiples of 16384: leave it out of the targets, or use 'nf4'"
        ):
            quantize_base(model, how, targets=parts)
        assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before
        return
    quantize_base(model, how, targets=parts)
    packed = [name for name, module in model.named_modules() if format_of(module) is not None]
    assert packed == parts
    assert {name: id(module) for name, module in model.named_modules()} == {name: i for name, (_, i) in before.items()}


def test_what_cannot_be_packed_is_named(make: Any) -> None:
    def refused(model: nn.Module, message: str, how: str = "nf4", **kwargs: Any) -> None:
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            quantize_base(model, how, **kwargs)
        assert snapshot(model) == before

    refused(plain_stack(), r"quantize='nf5' is not known; there are fp8, int8, nf4, torchao-int8, torchao-nf4", how="nf5")
    refused(adapted(plain_stack(), **CONFIG), r"'up' \(LoRALinear\) has an adapter already: quantize the base first")
    refused(make(TinyModel, tied=True), r"'lm_head' \(Linear\) shares its weight with embed.weight")
    refused(plain_stack(), "target_modules: 'sideways'", targets=["sideways"])
    model = plain_stack()
    model.up = type("Own", (nn.Linear,), {})(128, 256)
    refused(model, r"'up' \(Own\) is no plain nn.Linear")
    for how in ("nf4", "torchao-int8"):
        refused(plain_stack().double(), r"'up' \(Linear\) has a weight of float64, .* call model.float\(\) first", how=how)
    with torch.device("meta"):
        meta = Stack()
    with pytest.raises(ValueError, match=r"'up' \(Linear\) is on the meta device"):
        quantize_base(meta, "int8")
    with pytest.raises(ValueError, match=r"modules_to_save: 'up' is quantized and cannot be trained in full"):
        apply_lora(packed_stack("nf4"), LoRAConfig(rank=2, target_modules=["down"], modules_to_save=["up"]))


@pytest.mark.parametrize("how, library", [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("torchao-nf4", "torchao")])
def test_a_missing_library_is_named_with_its_extra(how: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    model = plain_stack()
    before = snapshot(model)
    with pytest.raises(ImportError, match=rf"needs the package {library}; pip install 'lightning-lora\[{library}\]'"):
        quantize_base(model, how)
    assert snapshot(model) == before


@each_format
def test_packing_twice_packs_what_is_left(how: str) -> None:
    model = packed_stack(how)
    weight = model.up.weight
    quantize_base(model, how)
    assert model.up.weight is weight and format_of(model.head) is not None


@each_format
def test_numbers_are_those_of_the_unpacked_model(how: str) -> None:
    plain, model = adapted(plain_stack(), **CONFIG), adapted(packed_stack(how), **CONFIG)
    assert trainable_parameters(model) == trainable_parameters(plain)
    assert [t.shape for t in find_targets(model, LoRAConfig(**CONFIG)).targets] == [(256, 128), (128, 256)]


@each_format
def test_copies_are_models_of_their_own(how: str) -> None:
    model, x = adapted(packed_stack(how), **CONFIG).train(), inputs()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    fill(model, seed=3)
    assert not torch.equal(twin(x), model(x))
    layer = LoRALinear.from_linear(packed_linear(how), rank=2)
    assert torch.equal(layer.train()(x), layer.linear(x))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("how", BITSANDBYTES)
def test_parity_with_peft(how: str) -> None:
    """PEFT's adapters on the same bitsandbytes model: same output, same gradients."""
    import peft

    ours = adapted(packed_stack(how), **CONFIG).train()
    loaded = packed_stack(how)
    setattr(loaded, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[how], True)  # PEFT takes its layers for these by it
    theirs = peft.get_peft_model(loaded, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"])).train()
    with torch.no_grad():
        for name in ("up", "down"):
            mine, layer = getattr(ours, name), getattr(theirs.base_model.model, name)
            layer.lora_A["default"].weight.copy_(mine.lora_A)
            layer.lora_B["default"].weight.copy_(mine.lora_B)
    assert type(theirs.base_model.model.up).__module__ == "peft.tuners.lora.bnb"
    x = inputs()
    outputs = [model(x) for model in (ours, theirs)]
    for y in outputs:
        y.square().sum().backward()
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
    for name in ("up", "down"):
        mine, layer = getattr(ours, name), getattr(theirs.base_model.model, name)
        assert torch.allclose(mine.lora_A.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)
        assert torch.allclose(mine.lora_B.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5)


def test_a_format_that_is_not_packed_again_is_refused_before_anything_is_merged() -> None:
    model = adapted(packed_stack("torchao-int8"), **CONFIG)
    packing = format_of(model.up)
    type(packing).requantizes = False
    try:
        with pytest.raises(ValueError, match=r"'up' cannot be merged: its weight, a Int8Tensor, is not packed again here"):
            merge_lora(model, quantized="requantize")
    finally:
        type(packing).requantizes = True
    assert not model.up.merged
