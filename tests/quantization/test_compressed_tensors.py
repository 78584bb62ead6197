"""compressed-tensors: refused with the way out, and that way taken. With a stand-in for its mark, and with the library if it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, export_merged, get_lora_parameters, merge_lora, quantize_base, unmerge_lora
from lightning_lora.ops import float8
from tests import tiny_lm
from tests.conftest import fill

ALL = LoRAConfig(rank=4, target_modules="all-linear")
WAY_OUT = r"compressed by compressed-tensors, .* load the model with quantization_config=CompressedTensorsConfig\(dequantize=True\)"


def marked(linear: nn.Linear) -> nn.Linear:
    """As the library leaves a layer: plain type, a mark, a forward that quantizes its input without a gradient."""
    scheme = type("QuantizationScheme", (), {"__module__": "compressed_tensors.quantization.quant_scheme"})
    linear.quantization_scheme = scheme()  # type: ignore[assignment]
    linear.forward = torch.no_grad()(linear.forward)  # type: ignore[method-assign]
    return linear


def in_fp8(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    linear.weight_scale = nn.Parameter(torch.ones(linear.out_features, 1), requires_grad=False)
    return linear


def packed(linear: nn.Linear) -> nn.Linear:
    """Four bits: there is no weight."""
    del linear._parameters["weight"]
    linear.weight_packed = nn.Parameter(torch.zeros(8, 1, dtype=torch.int32), requires_grad=False)
    return linear


@pytest.mark.parametrize("stored", [in_fp8, packed, lambda linear: linear], ids=["fp8", "packed", "unpacked at the first call"])
@pytest.mark.parametrize("target", ["0", "1"])
def test_it_is_refused_with_the_way_out(stored: Any, target: str) -> None:
    """Also where another layer is adapted: one before it would get no gradient."""
    model = nn.Sequential(nn.Linear(8, 8), stored(marked(nn.Linear(8, 8))))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'1'.*: it is " + WAY_OUT):
        apply_lora(model, LoRAConfig(rank=4, target_modules=[target]))
    assert type(model[0]) is nn.Linear and before == {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=WAY_OUT):
        quantize_base(model, "fp8")


def test_transformers_own_kernels_are_refused() -> None:
    """By their class's name: a stand-in, since not every transformers has them."""
    names = {"__module__": "transformers.integrations.compressed_tensors", "__qualname__": "CompressedTensorsFP8Linear"}
    theirs: Any = type("CompressedTensorsFP8Linear", (nn.Linear,), names)
    model = nn.Sequential(nn.Linear(8, 8), theirs(8, 8).requires_grad_(False))
    with pytest.raises(ValueError, match=r"'1'.*: it is " + WAY_OUT):
        apply_lora(model, LoRAConfig(rank=4, target_modules=["0"]))


def checkpoint(folder: Path, strategy: str) -> dict[str, Tensor]:
    """Write a Llama as vLLM's tools write one in FP8. Return what its weights stand for."""
    tiny_lm.llama().save_pretrained(folder)
    truth, written = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        written[name] = weight
        if name.endswith("proj.weight"):
            scale = (weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().max().reshape(1)) / 448
            written |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
            truth[name] = written[name].double() * scale.double()
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": strategy, "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    said = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {**said, "config_groups": {"group_0": group}}}
    (folder / "config.json").write_text(json.dumps(config))
    return truth


@pytest.mark.filterwarnings("default")  # the library's own
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_a_checkpoint_of_the_library(tmp_path: Path, strategy: str) -> None:
    pytest.importorskip("compressed_tensors")
    truth, ids = checkpoint(tmp_path / "base", strategy), torch.tensor([[2, 5, 9, 3]])
    compressed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for _ in range(2):
        with pytest.raises(ValueError, match=WAY_OUT):
            apply_lora(compressed, ALL)
        with torch.no_grad():
            compressed(input_ids=ids)  # unpacks the weights
    way_out = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=way_out)
    name = "model.layers.1.mlp.down_proj.weight"
    assert (model.state_dict()[name].double() - truth[name]).norm() < 1e-6 * truth[name].norm()
    quantize_base(model, "fp8", targets=["q_proj"])  # the others stay dequantized
    fill(apply_lora(model, ALL), std=0.05)
    optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(5):
        with float8.emulated():
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
        assert all(parameter.grad.norm() > 0 for parameter in get_lora_parameters(model))  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    layer = model.model.layers[1].mlp.down_proj
    merged = truth[name] + layer.lora_delta().double()
    wanted = model(input_ids=ids).logits
    merge_lora(model, quantized="dequantize")
    assert (layer.weight.double() - merged).norm() < 1e-6 * merged.norm()
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    export_merged(model, tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    unmerge_lora(model)
    assert (layer.weight.double() - truth[name]).norm() < 1e-6 * truth[name].norm()
