"""Models that come in FP8: transformers' FP8Linear with scales a block, torchao's float8; what else there is, is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.finegrained_fp8 import FP8Linear

from lightning_lora import (
    LoRAConfig,
    LoRALinear,
    apply_lora,
    export_merged,
    get_lora_parameters,
    merge_lora,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.ops.frozen_weight import flatten_weights, unflatten_weights
from lightning_lora.quantization.block_float8 import BlockFloat8Linear
from lightning_lora.quantization.formats import format_of
from tests import tiny_lm
from tests.conftest import fill, same_bits

BLOCKS = [(16, 16), (20, 12), None]  # of 32 x 32 weights; None: one scale for all


def expanded(scales: Tensor, block: Any) -> Tensor:
    """Entry by entry, as the format is defined."""
    high, wide = block or (32, 32)
    scales = scales.reshape(1, 1) if scales.dim() == 0 else scales
    return torch.stack([torch.stack([scales[i // high, j // wide] for j in range(32)]) for i in range(32)])


def fp8_linear(block: Any = (16, 16), seed: int = 0, bias: bool = False) -> tuple[FP8Linear, Tensor]:
    """A layer of transformers', and the weight that it stands for in float64."""
    generator = torch.Generator().manual_seed(seed)
    layer = FP8Linear(32, 32, block_size=block, has_bias=bias)
    codes = (torch.randn(32, 32, generator=generator) * 100).to(torch.float8_e4m3fn)
    layer.weight.data = codes
    scales = torch.rand(layer.weight_scale_inv.shape, generator=generator) * 1e-3 + 1e-4
    layer.weight_scale_inv.data = scales
    if bias:
        nn.init.normal_(layer.bias, generator=generator)
    return layer, codes.double() * expanded(scales, block).double()


def fp8_llama(block: Any = (16, 16)) -> tuple[Any, dict[str, Tensor]]:
    """As transformers loads one: q, k and v in FP8, all else in fp32."""
    model = tiny_lm.llama(cls=transformers.LlamaForCausalLM)
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": block}
    truth = {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj, truth[f"model.layers.{i}.self_attn.q_proj"] = fp8_linear(block, i)
    return model, truth


CONFIG = LoRAConfig(rank=4, target_modules=["q_proj", "o_proj"])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bias", [False, True])
def test_adapters_see_the_weight_with_its_scales(block: Any, bias: bool) -> None:
    layer, W = fp8_linear(block, bias=bias)
    b = layer.bias.detach().double() if bias else None
    model = fill(apply_lora(nn.Sequential(layer), LoRAConfig(rank=4, target_modules="all-linear")))
    assert type(layer).lora_base is BlockFloat8Linear and model[0] is layer
    x = torch.randn(5, 32, requires_grad=True)
    y, exact = layer(x), linear(x.double(), W + layer.lora_delta().double(), b)
    assert (y - exact).norm() < 1e-6 * exact.norm()
    mine, wanted = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, exact))
    assert (mine - wanted).norm() < 1e-5 * wanted.norm()
    assert layer.weight.grad is None and torch.equal(layer.linear(x), layer.base_forward(x))
    (again,) = unflatten_weights(*[list(part) for part in (layer.packed_weight().tensors, [layer.packed_weight().layout])])
    assert torch.equal(again.dense(torch.float64).float(), W.float()) and flatten_weights([again])[0] == list(again.tensors)


@pytest.mark.parametrize("quantized", ["dequantize", "requantize"])
def test_merges_carry_the_update_and_can_be_taken_back(quantized: Any) -> None:
    model, truth = fp8_llama()
    fill(apply_lora(model, CONFIG), std=0.05)
    layer = model.model.layers[0].self_attn.q_proj
    before = [code.clone() for code in format_of(layer).codes(layer)]  # type: ignore[union-attr]
    exact = truth["model.layers.0.self_attn.q_proj"] + layer.lora_delta().double()
    merge_lora(model, quantized=quantized)
    lost = (layer.base_weight().double() - exact).norm() / exact.norm()
    assert lost < (1e-6 if quantized == "dequantize" else 0.04)
    assert type(layer) is LoRALinear if quantized == "dequantize" else format_of(layer) is not None
    unmerge_lora(model)
    assert all(same_bits(a, b) for a, b in zip(before, format_of(layer).codes(layer), strict=True))  # type: ignore[union-attr]


def test_an_export_is_a_plain_model(tmp_path: Path) -> None:
    model, truth = fp8_llama()
    identity = base_identity(copy.deepcopy(model))
    export_merged(model, tmp_path / "never adapted")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(load_file(tmp_path / "never adapted" / "model.safetensors")[name].double(), truth[name[:-7]].bfloat16().double())
    fill(apply_lora(model, CONFIG), std=0.05)
    assert base_identity(model) == identity
    save_adapter(model, tmp_path / "adapter")
    exact = truth[name[:-7]] + model.model.layers[0].self_attn.q_proj.lora_delta().double()
    ids = torch.tensor([[2, 5, 9, 3]])
    wanted = model.eval()(input_ids=ids).logits
    for folder in ("unmerged", "merged"):
        export_merged(model, tmp_path / folder)
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"] and not hasattr(loaded.config, "quantization_config")
        assert (loaded.state_dict()[name].double() - exact).norm() < 1e-6 * exact.norm()
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
        merge_lora(model, quantized="dequantize")


@pytest.mark.parametrize("block", BLOCKS)
def test_unloaded_it_is_what_it_was(block: Any) -> None:
    """Class, attributes, state dict: its own save_pretrained writes what it was loaded from. Layers without an adapter too."""
    for targets in (CONFIG.target_modules, ["o_proj"]):
        model, _ = fp8_llama(block)
        layer = model.model.layers[0].self_attn.q_proj
        layer.activation_scale = nn.Parameter(torch.tensor(2.0))
        before = {name: (t.dtype, t.clone()) for name, t in model.state_dict().items()}
        kept = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        apply_lora(model, LoRAConfig(rank=4, target_modules=targets))
        assert isinstance(layer, BlockFloat8Linear)
        unload_lora(model)
        assert type(layer) is FP8Linear and {name: vars(layer)[name] for name in vars(layer) if not name.startswith("_")} == kept
        after = model.state_dict()
        assert {name: t.dtype for name, t in after.items()} == {name: dtype for name, (dtype, _) in before.items()}
        assert all(same_bits(t, before[name][1]) for name, t in after.items())
        assert format_of(apply_lora(model, CONFIG).model.layers[0].self_attn.q_proj) is not None


def test_unloaded_with_a_merge_it_has_the_merged_weight() -> None:
    model, truth = fp8_llama()
    fill(apply_lora(model, CONFIG), std=0.05)
    layer = model.model.layers[0].self_attn.q_proj
    exact = truth["model.layers.0.self_attn.q_proj"] + layer.lora_delta().double()
    unload_lora(merge_lora(model, quantized="requantize"), merged="keep")
    assert type(layer) is FP8Linear and layer.weight_scale_inv.shape == (2, 2)
    packed = format_of(layer)
    assert packed is not None and (packed.dequantize(layer).double() - exact).norm() < 0.05 * exact.norm()
    other, _ = fp8_llama()
    other = apply_lora(other, CONFIG)
    unload_lora(merge_lora(other, quantized="dequantize"), merged="keep")
    plain = other.model.layers[0].self_attn.q_proj
    assert type(plain) is nn.Linear and "came_as" not in vars(plain)


def test_a_refused_call_gives_every_layer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = fp8_llama()
    monkeypatch.setattr("lightning_lora.model.apply.let_gradients_in", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply_lora(model, LoRAConfig(rank=4, target_modules=["o_proj"]))
    assert all(type(layer.self_attn.q_proj) is FP8Linear for layer in model.model.layers)


def test_state_dicts_keep_names_and_dtypes() -> None:
    """Of layers without an adapter in a model that has adapters."""
    config, x = LoRAConfig(rank=4, target_modules=["o_proj"]), torch.tensor([[2, 5, 9, 3]])
    model, _ = fp8_llama()
    before = {name: t.dtype for name, t in model.state_dict().items()}
    apply_lora(model, config)
    after = model.state_dict()
    assert {name: t.dtype for name, t in after.items() if "lora_" not in name} == before
    y = model(input_ids=x).logits
    other, _ = fp8_llama()
    apply_lora(other, config)
    other.model.layers[0].self_attn.q_proj.weight.zero_()
    other.load_state_dict(after)
    assert torch.equal(other(input_ids=x).logits, y)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert (half(input_ids=x).logits - y).norm() < 0.05 * y.norm()  # scales and codes are not rounded


def test_what_is_not_known_is_refused_by_name() -> None:
    layer, _ = fp8_linear()
    layer.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'0': its weight is packed as FP4, a format that is not known here"):
        apply_lora(nn.Sequential(layer), LoRAConfig(rank=4, target_modules="all-linear"))
    compressed = nn.Linear(32, 32)  # as compressed-tensors leaves one that is not decompressed
    compressed.weight = nn.Parameter(torch.zeros(32, 32).to(torch.float8_e4m3fn), requires_grad=False)
    compressed.weight_scale = nn.Parameter(torch.ones(32, 1), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"'0' .* stores its weight as torch.float8_e4m3fn, which is neither plain .*: dequantize the base"
    ):
        apply_lora(nn.Sequential(compressed), LoRAConfig(rank=4, target_modules="all-linear"))


def test_torchaos_float8() -> None:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 48, bias=False)).to(torch.bfloat16)
    quantize_(model, Float8WeightOnlyConfig())
    W = model[0].weight.dequantize().double()
    fill(apply_lora(model, LoRAConfig(rank=4, target_modules="all-linear")))
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    exact = linear(x.double(), W + model[0].lora_delta().double())
    assert (model(x) - exact).norm() < 1e-2 * exact.norm()
    leaves, weights = [x, *get_lora_parameters(model)], torch.randn(5, 48)
    mine, wanted = (torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True) for y in (model(x), exact))
    assert all((a - b).norm() < 1e-2 * b.norm() for a, b in zip(mine, wanted, strict=True))
    with pytest.raises(ValueError, match="is not packed again here: pass quantized='dequantize'"):
        merge_lora(model, quantized="requantize")
    merge_lora(model, quantized="dequantize")
    assert type(model[0]) is LoRALinear and (model(x) - exact).norm() < 1e-2 * exact.norm()
    unmerge_lora(model)
    assert torch.equal(model[0].weight.dequantize().double(), W)


@pytest.mark.parametrize("weight", ["Int8Tensor", "Float8Tensor"])
def test_torchaos_weights_that_quantize_inputs_are_refused(weight: str) -> None:
    """Int8: an output without a gradient, so that layers before it would silently get none. Float8 ones raise in the backward pass."""
    import torchao.quantization as ao

    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32, bias=False)).to(torch.bfloat16)
    if weight == "Int8Tensor":
        ao.quantize_(model[1], ao.Int8DynamicActivationInt8WeightConfig())
        assert not model[1](torch.randn(2, 48).bfloat16().requires_grad_()).requires_grad
    else:
        from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs as Inputs

        packed = ao.Float8Tensor.from_hp(
            model[1].weight.detach(), granularity=ao.PerRow(), act_quant_kwargs=Inputs(granularity=ao.PerRow())
        )
        model[1].weight = nn.Parameter(packed, requires_grad=False)
    for target in ("0", "1"):
        with pytest.raises(
            ValueError, match=rf"'1'.*its {weight} quantizes inputs too.*: quantize the weights only \(Int8WeightOnlyConfig"
        ):
            apply_lora(model, LoRAConfig(rank=4, target_modules=[target]))
    assert type(model[0]) is nn.Linear
