"""Experts that come packed: transformers' FP8Experts with scales a block are trained through; the others are refused with the way out."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import FineGrainedFP8Config, GptOssConfig, Llama4TextConfig
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Llama4TextExperts
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    export_merged,
    find_targets,
    get_lora_parameters,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.adapter_io.merged_weights import MergedWeights
from lightning_lora.quantization.formats import format_of
from tests.conftest import fill, same_bits
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.mixtures import FQN, IDS

CONFIG = LoRAConfig(rank=3, alpha=6, target_modules=["experts"])
E, H, W = 8, 32, 16  # experts, hidden size, width
BLOCKS: list[Any] = [(16, 16), (20, 12), (64, 64), None]  # of 32 x 32 and 32 x 16; wider than a matrix: one for gate, one for up
each_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


def fp8_qwen3_moe(block: Any = (16, 16), implementation: str = "grouped_mm", scale_fmt: str = "float", **config: Any) -> Any:
    """As transformers loads one, with random codes and scales in its experts."""
    model = tiny_qwen3_moe(layers=1, implementation=implementation)
    settings = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt, **config)
    replace_with_fp8_linear(model, ["lm_head", "gate", "q_proj", "k_proj", "v_proj", "o_proj"], settings)
    layer, generator = model.get_submodule(FQN), torch.Generator().manual_seed(0)
    for name, parameter in list(layer._parameters.items()):
        if parameter is None:
            continue
        value = torch.rand(parameter.shape, generator=generator) * 1e-3 + 1e-4
        if "scale" not in name:
            value = torch.randn(parameter.shape, generator=generator) * 100
        layer._parameters[name] = nn.Parameter(value.to(parameter.dtype), requires_grad=False)
    return model


def truth(layer: Any) -> dict[str, Tensor]:
    """Entry by entry, as the format is defined: a scale for each block, or where that is wider, for each of gate and up."""
    found = {}
    for name in ("gate_up_proj", "down_proj"):
        codes, scales = layer._parameters[name].double(), layer._parameters[f"{name}_scale_inv"].float().double()
        high, wide = layer.block_size or codes.shape[1:]
        if -(-codes.shape[1] // high) != scales.shape[1]:
            high = codes.shape[1] // scales.shape[1]
        rows, columns = torch.arange(codes.shape[1]) // high, torch.arange(codes.shape[2]) // wide
        found[name] = codes * scales[:, rows][:, :, columns]
    return found


def plain_twin(model: Any, weights: dict[str, Tensor]) -> Any:
    """The same model with those weights, dense."""
    plain = tiny_qwen3_moe(torch.float64, layers=1)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict() and ".experts." not in k}, strict=False)
    for name, weight in weights.items():
        plain.get_submodule(FQN)._parameters[name] = nn.Parameter(weight)
    return plain


@each_block
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_adapters_see_the_weights_with_their_scales(block: Any, implementation: str) -> None:
    """Outputs and gradients are those of the dense model in float64; the layers before get their gradient."""
    model = fp8_qwen3_moe(block, implementation)
    layer = model.get_submodule(FQN)
    weights = truth(layer)
    plain = plain_twin(model, weights)
    targets = LoRAConfig(rank=3, alpha=6, target_modules=["experts", "q_proj"])
    for each in (model, plain):
        fill(apply_lora(each, targets), std=0.1)
    for mine, theirs in zip(get_lora_parameters(model), get_lora_parameters(plain), strict=True):
        theirs.data = mine.data.double()
    found, wanted = model(IDS).logits, plain(IDS).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    found.square().sum().backward()
    wanted.square().sum().backward()
    for mine, theirs in zip(get_lora_parameters(model), get_lora_parameters(plain), strict=True):
        assert theirs.grad.any() and (mine.grad - theirs.grad).norm() < 1e-4 * theirs.grad.norm()
    for name, part in layer.by_weight().items():
        assert torch.equal(part.base_weight(), weights[name].float())


@pytest.mark.parametrize("quantized", ["dequantize", "requantize"])
def test_merges_carry_the_update_and_can_be_taken_back(quantized: Any) -> None:
    for implementation in ("eager", "grouped_mm"):
        model = fp8_qwen3_moe(implementation=implementation)
        layer = model.get_submodule(FQN)
        weights = truth(layer)
        fill(apply_lora(model, CONFIG), std=0.1)
        before = model(IDS).logits
        sums = {name: weights[name] + part.lora_delta().detach().double() for name, part in layer.by_weight().items()}
        merge_lora(model, quantized=quantized)
        for name, part in layer.by_weight().items():
            assert (part.base_weight() - sums[name]).norm() < (1e-6 if quantized == "dequantize" else 0.04) * sums[name].norm()
        after = model(IDS).logits
        assert (after - before).norm() < (1e-5 if quantized == "dequantize" else 0.1) * before.norm()
        unmerge_lora(model)
        assert same_bits(model(IDS).logits, before)
        unload_lora(merge_lora(model, quantized=quantized), merged="keep")
        assert same_bits(model(IDS).logits, after) if quantized == "dequantize" else type(layer) is FP8Experts
        kept = truth(layer) if type(layer) is FP8Experts else dict(layer.named_parameters())
        assert (kept["down_proj"] - sums["down_proj"]).norm() < 0.04 * sums["down_proj"].norm()


@each_block
def test_unloaded_it_is_what_it_was(block: Any) -> None:
    """Class, attributes, state dict while adapted and after; whether the experts or only attention is adapted."""
    for targets in (["experts"], ["q_proj"]):
        model = fp8_qwen3_moe(block, scale_fmt="ue8m0" if block == (16, 16) else "float")
        layer = model.get_submodule(FQN)
        before, kept = {name: t.clone() for name, t in model.state_dict().items()}, {n for n in vars(layer) if not n.startswith("_")}
        everything = LoRAConfig(rank=2, target_modules="all-linear")
        identity, mine, plain = base_identity(model), find_targets(model, everything), find_targets(tiny_qwen3_moe(layers=1), everything)
        assert (mine.reached, mine.total, mine.left_out, mine.passed_over) == (plain.reached, plain.total, plain.left_out, {})
        apply_lora(model, LoRAConfig(rank=2, target_modules=targets))
        assert base_identity(model) == identity and format_of(layer) is not None and type(layer) is not FP8Experts
        after = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
        assert after.keys() == before.keys()
        assert all(torch.equal(t.float(), before[name].float()) for name, t in after.items())
        twin = copy.deepcopy(model) if block == (16, 16) else pickle.loads(pickle.dumps(model))  # torch pickles no scales of ue8m0
        assert type(twin.get_submodule(FQN)) is type(layer) and same_bits(twin(IDS).logits, model(IDS).logits)
        twin.get_submodule(FQN).down_proj.data.zero_()
        twin.load_state_dict(model.state_dict())
        assert same_bits(twin(IDS).logits, model(IDS).logits)
        unload_lora(model)
        assert type(layer) is FP8Experts and {n for n in vars(layer) if not n.startswith("_")} == kept
        assert all(t.dtype == before[name].dtype and same_bits(t, before[name]) for name, t in model.state_dict().items())


def test_files(tmp_path: Path) -> None:
    """An export is a plain model; an adapter loads on the base in 16 bits too, of which embeddings and norms are compared."""
    model = fp8_qwen3_moe()
    weights = truth(model.get_submodule(FQN))
    plain = plain_twin(model, weights).float()
    fill(apply_lora(model, CONFIG), std=0.1)
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    delta = model.get_submodule(FQN).by_weight()["down_proj"].lora_delta()
    assert not [name for name in stored if "scale" in name]
    for expert in range(E):
        wanted = weights["down_proj"][expert] + delta[expert]
        assert (stored[f"{FQN}.{expert}.down_proj.weight"] - wanted).norm() < 1e-5 * wanted.norm()
    with pytest.warns(UserWarning, match="one of the two bases came quantized, so only what is not packed"):
        load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_trained_on_is_refused_with_the_way_out() -> None:
    def refused(model: nn.Module, message: str, targets: Any = ("q_proj",)) -> None:
        classes = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            apply_lora(model, LoRAConfig(rank=2, target_modules=list(targets)))
        assert [type(module) for module in model.modules()] == classes

    model = fp8_qwen3_moe()
    model.config._experts_implementation = "deepgemm"
    for targets in (("q_proj",), ("experts",)):
        refused(copy.deepcopy(model), rf"{FQN}'.*experts_implementation='deepgemm'", targets)
    model = fp8_qwen3_moe(expert_dtype="fp4", implementation="eager")
    refused(
        model, r"its weights are packed as FP4.*FineGrainedFP8Config\(dequantize=True\), and quantize it with 'fp8' or 'nf4'", ["experts"]
    )
    model = fp8_qwen3_moe()
    layer = model.get_submodule(FQN)
    layer.down_proj_scale_inv = nn.Parameter(torch.ones(E, 5, 3))
    refused(model, r"down_proj \(8, 32, 16\) has scales \(8, 5, 3\) in torch.float32, not a number for each \(16, 16\): .*dequantize=True")
    gpt_oss, llama4 = GptOssConfig(hidden_size=H, intermediate_size=W), Llama4TextConfig(hidden_size=H, intermediate_size=W)
    packed_by = {
        r"'experts': its experts are packed as MXFP4.*Mxfp4Config\(dequantize=True\)": Mxfp4GptOssExperts(gpt_oss),
        r"'experts': its experts are packed for fbgemm.*without this quantization_config": FbgemmFp8Llama4TextExperts(llama4),
    }
    for message, inside in packed_by.items():
        refused(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "experts": inside}), message)
        with pytest.raises(ValueError, match="cannot be exported: its experts are packed"):
            MergedWeights(nn.Sequential(inside))
