"""FP8 bases in a whole model: how far adapter gradients are from float64, beside bf16's own; what `.to` and state dicts leave alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, merge_lora, quantize_base
from lightning_lora.ops import float8
from lightning_lora.quantization.float8 import Float8Linear
from lightning_lora.quantization.formats import format_of
from tests.conftest import adapted, fill, same_bits
from tests.model.quantizing import CONFIG
from tests.quantized import inputs, packed_stack, plain_stack


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, initializer_range=0.08, **sizes))


def gradients(dtype: torch.dtype, quantize: bool = False) -> list[Tensor]:
    """Every adapter's, in float64."""
    base = llama().to(dtype)
    model = fill(apply_lora(quantize_base(base, "fp8") if quantize else base, LoRAConfig(rank=4, target_modules="all-linear")), std=0.05)
    ids = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return [p.grad.double() for p in get_lora_parameters(model)]  # type: ignore[union-attr]


def test_gradients_beside_those_of_bf16() -> None:
    """Where bf16 keeps 8 bits of every number, e4m3 keeps 4. Adapter gradients were off by 1-4 % and 7-28 %."""
    exact, half = gradients(torch.float64), gradients(torch.bfloat16)
    with float8.emulated():
        packed = gradients(torch.bfloat16, quantize=True)
    errors = [[((a - b).norm() / b.norm()).item() for a, b in zip(mine, exact, strict=True)] for mine in (half, packed)]
    assert len(exact) == 2 * 7 * 2 and max(errors[0]) < 0.08 and max(errors[1]) < 0.4
    assert all(rough > 2 * fine for fine, rough in zip(*errors, strict=True))  # it did multiply in FP8
    assert all(torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.93 for a, b in zip(packed, exact, strict=True))


def stored(model: Any) -> list[Tensor]:
    return [code.clone() for layer in (model.up, model.down) for code in format_of(layer).codes(layer)]  # type: ignore[union-attr]


@pytest.mark.parametrize("with_adapters", [False, True])
def test_another_dtype_or_device_leaves_codes_and_scales_alone(with_adapters: bool) -> None:
    model = packed_stack("fp8")
    model = adapted(model, **CONFIG) if with_adapters else model
    before = stored(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        assert model.up.weight.dtype == torch.uint8 and model.up.weight_scale.dtype == torch.float32
        assert float8.dequantize(*stored(model)[:2], dtype).dtype == format_of(model.up).dequantize(model.up).dtype == dtype
        assert model(inputs().to(dtype)).dtype == dtype
    assert all(same_bits(a, b) for a, b in zip(before, stored(model), strict=True))
    y = model(inputs())
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(inputs()), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs()), y)


def test_state_dicts() -> None:
    model, other = packed_stack("fp8"), plain_stack()
    state = model.state_dict()
    assert {"up.weight", "up.weight_scale", "up.bias"} <= state.keys() and "head.weight_scale" not in state
    with torch.no_grad():
        other.up.weight.mul_(3)
    quantize_base(other, "fp8", targets=["up", "down"]).load_state_dict(state)
    assert torch.equal(other(inputs()), model(inputs()))
    with pytest.raises(RuntimeError, match=r"up.weight: a weight in torch.float32 for a layer that is quantized to FP8; load it first"):
        other.load_state_dict(plain_stack().state_dict())
    assert torch.equal(other(inputs()), model(inputs()))
    del state["up.weight_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*up.weight_scale"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"up.weight_scale: shape \(3,\) is not \(256,\)"):
        other.load_state_dict({**state, "up.weight_scale": torch.ones(3)})


def test_a_merge_that_packs_again_keeps_what_was_on_the_grid() -> None:
    """Scales are powers of two, so a weight that came from FP8 goes back to the same codes: only the update is rounded."""
    model = apply_lora(packed_stack("fp8"), LoRAConfig(**CONFIG))  # B is zero
    before = model.up.base_weight()
    merge_lora(model, quantized="requantize")
    assert type(model.up).lora_base is Float8Linear and torch.equal(model.up.base_weight(), before)


def test_half_precision_weights_are_exact_in_bf16() -> None:
    model = quantize_base(nn.Sequential(nn.Linear(64, 48)).to(torch.bfloat16), "fp8")
    codes, scale = format_of(model[0]).codes(model[0])  # type: ignore[union-attr]
    exact = float8.dequantize(codes, scale, torch.float64)
    assert torch.equal(format_of(model[0]).dequantize(model[0]).double(), exact)  # type: ignore[union-attr]


def test_scales_follow_a_weight_that_was_moved_without_them() -> None:
    """As FSDP2 moves one: parameters and buffers, by their data. Another device than the CPU that every machine has is "meta"."""
    layer = adapted(packed_stack("fp8"), **CONFIG).down
    layer._parameters["weight"] = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    assert layer.weight_scale.device.type == "cpu" and layer.base_forward(torch.empty(5, 256, device="meta")).shape == (5, 128)
    assert layer.weight_scale.device.type == "meta"
