"""bitsandbytes' 4-bit weights as operations take them: the same weight to the bit, and only where its own forward would do the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearNF4
from torch import nn
from torch.testing import assert_close

from lightning_lora import LoRAConfig, LoRALinear, apply_lora, merge_lora, unmerge_lora
from lightning_lora.ops.frozen_weight import FrozenWeight, reader_of
from lightning_lora.quantization.bitsandbytes import WeightReader4bit
from tests.conftest import fill
from tests.quantized import linear4bit, packed_linear, stored4bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"nested": False}, {"kind": "fp4"}, {"kind": "fp4", "nested": False, "quant_storage": torch.bfloat16}], ids=str
)
def test_is_unpacked_as_bitsandbytes_does(options: dict[str, Any], dtype: torch.dtype) -> None:
    stored, dense = stored4bit(48, 96, **options)
    assert len(stored.tensors) == (6 if options.get("nested", True) else 3)
    assert torch.equal(stored.dense(dtype), dense.to(dtype))
    for rows in (3, 1600):
        x, bias = torch.randn(rows, 96).to(dtype), torch.randn(48)
        assert torch.equal(stored.linear(x, bias), torch.nn.functional.linear(x, dense.to(dtype), bias.to(dtype)))
    assert sum(t.nbytes for t in stored.tensors) < dense.numel() * 0.75 + 1100  # bytes; the table of the packed scales is 1024


def test_a_block_size_of_its_own() -> None:
    layer = linear4bit(64, 128)
    layer.weight = type(layer.weight)(torch.randn(64, 128), blocksize=128, quant_type="nf4", compress_statistics=True, module=layer).to(
        "cpu"
    )
    stored = WeightReader4bit().read(layer, torch.randn(3, 128))
    assert stored is not None
    assert torch.equal(stored.dense(torch.float32), layer(torch.eye(128)).T)


class Doubled(Linear4bit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_layers_are_known_by_the_forward_they_have() -> None:
    assert isinstance(reader_of(Linear4bit), WeightReader4bit) and isinstance(reader_of(LinearNF4), WeightReader4bit)
    assert reader_of(Doubled) is None
    assert LoRALinear.weight_reader is reader_of(nn.Linear) and not isinstance(LoRALinear.weight_reader, WeightReader4bit)


def adapted(bias: bool = True, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    return fill(apply_lora(nn.Sequential(packed_linear("nf4", dtype, bias)), LoRAConfig(rank=4, target_modules="all-linear", **fields)))[
        0
    ].train()


def for_inference(layer: Any) -> None:
    layer.weight.quant_state.packing_format_for_cpu = True


def from_transposed(layer: Any) -> None:
    layer.weight.quant_state.shape = torch.Size((128, 256))


def other_dtype(layer: Any) -> None:
    layer.compute_dtype = torch.bfloat16


def unset_dtype(layer: Any) -> None:
    layer.compute_dtype, layer.compute_type_is_set = None, False


CASES = {  # what was done to the layer → whether it is served
    "nothing": (lambda layer: None, True),
    "dtype not known yet": (unset_dtype, True),
    "evaluation": (lambda layer: layer.eval(), True),
    "another compute dtype": (other_dtype, False),
    "rewritten for inference": (for_inference, False),
    "packed transposed": (from_transposed, False),
    "merged": (lambda layer: layer.merge_weights(quantized="requantize"), False),
    "not packed": (lambda layer: (setattr(layer.weight, "quant_state", None), setattr(layer, "quant_state", None)), False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_served(case: str) -> None:
    layer, (change, served) = adapted(), CASES[case]
    change(layer)
    for gradients in (True, False):  # a checkpointed block runs without them first, and has to draw the same dropout then
        with torch.set_grad_enabled(gradients):
            assert (layer.frozen_weight(torch.randn(3, 128)) is not None) is served


def test_autocast_has_to_be_in_the_same_dtype() -> None:
    for dtype, served in ((torch.float32, False), (torch.bfloat16, True)):
        with torch.autocast("cpu", torch.bfloat16):
            assert (adapted(dtype=dtype).frozen_weight(torch.randn(3, 128, dtype=dtype)) is not None) is served
    assert adapted().frozen_weight(torch.randn(3, 128, dtype=torch.bfloat16)) is None


def test_8_bit_and_torchao_stay_on_their_own_path() -> None:
    eight = apply_lora(nn.Sequential(packed_linear("int8")), LoRAConfig(rank=4, target_modules="all-linear"))[0]
    assert eight.weight_reader is None and eight.frozen_weight(torch.randn(3, 128)) is None
    for how in ("torchao-nf4", "torchao-int8"):
        ao = apply_lora(nn.Sequential(packed_linear(how)), LoRAConfig(rank=4, target_modules="all-linear"))[0]
        assert ao.frozen_weight(torch.randn(3, 128)) is None


def run(layer: Any, x: torch.Tensor, fused: bool = False) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer.fused_output(x) if fused else layer(x)
    return [y, *torch.autograd.grad(y.square().mean(), [x, layer.lora_A, layer.lora_B])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_the_same_as_over_bitsandbytes_own_forward(
    dtype: torch.dtype, bias: bool, autocast: bool, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 to a rounding of the sum of base and update; the base's product has the same bits."""
    layer, x = adapted(bias, dtype, variant=variant), torch.randn(2, 7, 128).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
        assert layer.frozen_weight(x) is not None
        mine = run(layer, x, fused=True)
        monkeypatch.setattr(type(layer), "weight_reader", None)
        assert layer.fused_output(x) is None
        theirs = run(layer, x)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, other in zip(mine, theirs, strict=True):
        assert ours.dtype == other.dtype and (ours - other).norm() <= tolerance * other.norm()
    monkeypatch.undo()
    with torch.no_grad():
        layer.lora_B.zero_()
        assert variant == "dora" or torch.equal(layer.fused_output(x), layer.base_forward(x))


def test_merging_and_copies_come_back_to_it() -> None:
    layer, x = adapted(), torch.randn(3, 128)
    before = run(layer, x)
    for quantized in ("dequantize", "requantize"):
        merge_lora(layer, quantized=quantized)
        layer(x)
        unmerge_lora(layer)
        assert layer.frozen_weight(x) is not None
        assert_close(run(layer, x), before, rtol=0, atol=0)
    twin = copy.deepcopy(layer)
    assert twin.frozen_weight(x) is not None
    assert_close(run(twin, x), before, rtol=0, atol=0)


@pytest.mark.parametrize("passes", [0, 1])  # the first pass moves codes and scales from the weight to the layer's state
@pytest.mark.parametrize("made_by", ["quantize_base", "bitsandbytes"])
def test_codes_and_scales_of_8_bits_move_with_the_weight(made_by: str, passes: int) -> None:
    """A base packed on the CPU and trained on a GPU: its first product failed. Here a clone is the other device."""
    layer = packed_linear("int8") if made_by == "quantize_base" else Linear8bitLt(128, 256, has_fp16_weights=False, threshold=6.0)
    model = apply_lora(nn.Sequential(layer), LoRAConfig(rank=4, target_modules="all-linear")).eval()
    x = torch.randn(3, 128)
    before = [copy.deepcopy(model)(x), model[0].base_weight()]
    for _ in range(passes):
        model(x)
    for moved in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer, old = moved[0], moved[0].weight.data
        moved._apply(torch.clone)
        assert layer.weight.data_ptr() == layer.weight.CB.data_ptr() != old.data_ptr() and layer.state.CB is None
        assert_close([moved(x), layer.base_weight()], before, rtol=0, atol=0)
        assert layer.state.CB.data_ptr() == layer.weight.data_ptr()


def test_a_plain_weight_is_stored_as_it_is() -> None:
    weight = torch.randn(3, 4)
    assert FrozenWeight(weight).dense(torch.float32) is weight
