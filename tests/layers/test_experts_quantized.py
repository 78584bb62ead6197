"""Experts that ``quantize_base`` packed: adapters on them compute with the dequantized weights, and nothing dense stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    disabled_lora,
    export_merged,
    find_targets,
    get_lora_parameters,
    load_adapter,
    merge_lora,
    merge_report,
    quantize_base,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.model import quantize
from lightning_lora.model.apply import trainable_parameters
from lightning_lora.ops import frozen_stack
from lightning_lora.quantization.formats import dequantized, format_of, single
from tests.conftest import fill, same_bits
from tests.layers import test_experts
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.mixtures import CONFIG, FQN, IDS, dropout_gradients, experts
from tests.layers.test_experts import NAMES, E, definition

HIDDEN, WIDTH = 16, 8
FORMATS = ["fp8", "nf4"]
IMPLEMENTED = {"qwen3_moe", "gpt_oss", "nemotron_h"}  # by transformers' functions; the others have a forward of their own
ERROR = {"fp8": 0.03, "nf4": 0.12}  # of the weight
each_format = pytest.mark.parametrize("how", FORMATS)
both_ways = pytest.mark.parametrize("quantized", ["dequantize", "requantize"])


def build(name, dtype=torch.float32):
    return test_experts.build(name, HIDDEN, WIDTH).to(dtype)


def arguments(name, dtype=torch.float32):
    x, *rest = test_experts.arguments(name, HIDDEN)
    rest = [each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in rest]
    return [x.detach().to(dtype).requires_grad_(), *rest]


def packed(name, how, dtype=torch.float32, **fields):
    model = quantize_base(build(name, dtype), how, targets=["experts"])
    apply_lora(model, LoRAConfig(rank=3, alpha=6, target_modules=["experts"], **fields))
    return fill(model, std=0.3), model["experts"]


def opened(module):
    """What the packed weights stand for, in float64."""
    return {name: dequantized(single(module, name)).double() for name in format_of(module).packed(module)}


def exact(name, layer):
    """The adapted layer in float64, over what the packed weights stand for."""
    model = build(name, torch.float64)
    for key, weight in opened(layer).items():
        model["experts"]._parameters[key] = nn.Parameter(weight)
    twin = apply_lora(model, LoRAConfig(rank=3, alpha=6, target_modules=["experts"]))["experts"]
    with torch.no_grad():
        for key, parameter in layer.lora_parameters().items():
            twin._parameters[key] = nn.Parameter(parameter.double())
    return twin


@each_format
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_definitions(name, how):
    """In float64 with the dequantized weights, token by token; in every implementation."""
    _, layer = packed(name, how)
    twin, given = exact(name, layer), arguments(name)
    plain = build(name)["experts"]
    for key, weight in opened(layer).items():
        assert 0 < (weight - plain._parameters[key]).norm() / weight.norm() < ERROR[how]
    factors = {key: p.detach().double().requires_grad_() for key, p in layer.lora_parameters().items()}
    x = given[0].detach().double().requires_grad_()
    wanted = definition(
        name, twin, factors, x, *(each.double() if getattr(each, "is_floating_point", bool)() else each for each in given[1:])
    )
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    theirs = torch.autograd.grad((wanted * weights).sum(), [x, *factors.values()])
    for implementation in ("eager", "batched_mm", "grouped_mm") if name in IMPLEMENTED else (None,):
        if implementation is not None:
            layer.config._experts_implementation = implementation
        found = layer(*given)
        mine = torch.autograd.grad((found * weights.float()).sum(), [given[0], *layer.lora_parameters().values()])
        for a, b in zip((found, *mine), (wanted, *theirs), strict=True):
            assert b.any() and (a - b).norm() < 2e-6 * b.norm(), implementation


@each_format
def test_the_weights_take_the_bytes_that_the_format_promises(how):
    model = quantize_base(nn.ModuleDict({"experts": test_experts.build("qwen3_moe", 128, 64)["experts"].bfloat16()}), how)
    layer, weights, channels = model["experts"], E * 3 * 64 * 128, E * (2 * 64 + 128)
    held = [p for p in layer.parameters()] + [t for stack in layer.packed_stacks.values() for t in stack.tensors.values()]
    tables = 2 * (256 + 16) * 4
    promised = {"fp8": weights + 4 * channels, "nf4": weights // 2 + weights // 64 * (1 + 4 / 256) + E * 2 * 4 + E * 2 * 4 + tables}
    assert weights * {"fp8": 1, "nf4": 0.5}[how] < sum(t.nbytes for t in held) <= promised[how]
    assert all(p.dtype == torch.uint8 and not p.requires_grad for p in layer.parameters())
    assert trainable_parameters(model) == (0, weights)


@each_format
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_dense_copy_is_kept_and_few_are_there_at_once(how, implementation, monkeypatch):
    model, layer = packed("qwen3_moe", how)
    layer.config._experts_implementation = implementation
    x, *rest = arguments("qwen3_moe")
    wanted = layer(x, *rest)
    gradients = torch.autograd.grad(wanted.square().sum(), [x, *get_lora_parameters(model)])
    matrix = 2 * WIDTH * HIDDEN
    dense, saved = [], []
    make = frozen_stack.FrozenStack.dense
    monkeypatch.setattr(frozen_stack.FrozenStack, "dense", lambda self, dtype: dense.append(self.numel()) or make(self, dtype))
    monkeypatch.setattr(frozen_stack, "MOST", 2 * matrix * 4)  # two of the larger matrices
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = layer(x, *rest)
    torch.testing.assert_close(found, wanted)
    again = torch.autograd.grad(found.square().sum(), [x, *get_lora_parameters(model)])
    torch.testing.assert_close(again, gradients)
    assert max(dense) == (1 if implementation == "eager" else 2) * matrix
    assert not [t for t in saved if t.is_floating_point() and t.shape[-2:] in ((2 * WIDTH, HIDDEN), (HIDDEN, 2 * WIDTH), (HIDDEN, WIDTH))]


@each_format
@both_ways
def test_merging_is_a_choice_and_can_be_taken_back(how, quantized):
    for name in ("qwen3_moe", "gpt_oss"):
        model, layer = packed(name, how)
        base, given, before = type(layer).lora_base, arguments(name), layer(*arguments(name))
        codes = {key: [t.clone() for t in format_of(part).codes(part)] for key, part in layer.by_weight().items()}
        parameters = {key: layer._parameters[key] for key in codes}
        sums = {key: weight + layer.by_weight()[key].lora_delta().double() for key, weight in opened(layer).items()}
        with pytest.raises(ValueError, match=r"'experts' cannot be merged: \w+: its weight is quantized.*'dequantize'.*'requantize'"):
            merge_lora(model)
        merge_lora(model, quantized=quantized)
        for key, part in layer.by_weight().items():
            lost = (part.base_weight().double() - sums[key]).norm() / sums[key].norm()
            assert lost < (1e-6 if quantized == "dequantize" else ERROR[how])
        assert (format_of(layer) is None) == (quantized == "dequantize") and max(merge_report(model).values()) > 0
        assert (layer(*given) - before).norm() < {"dequantize": 1e-5, "requantize": 4 * ERROR[how]}[quantized] * before.norm()
        unmerge_lora(model)
        assert type(layer).lora_base is base and same_bits(layer(*given), before)
        for key, part in layer.by_weight().items():
            assert layer._parameters[key] is parameters[key]
            assert all(same_bits(a, b) for a, b in zip(format_of(part).codes(part), codes[key], strict=True))
        merge_lora(model, quantized=quantized)
        after = layer(*given)
        unload_lora(model, merged="keep")
        assert same_bits(model["experts"](*given), after)
        assert type(model["experts"]) is (type(build(name)["experts"]) if quantized == "dequantize" else base)


def test_a_merge_that_fails_leaves_both_weights_packed(monkeypatch):
    _, layer = packed("qwen3_moe", "fp8")
    before = layer(*arguments("qwen3_moe"))
    monkeypatch.setattr("lightning_lora.layers.merge_plans.make_parameter", lambda value, _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer.merge_weights(quantized="dequantize")
    assert [*layer.packed_stacks] == ["gate_up_proj", "down_proj"] and not layer.merged
    assert same_bits(layer(*arguments("qwen3_moe")), before)


@each_format
def test_copies_pickles_dtypes_and_state_dicts(how):
    model, layer = packed("gpt_oss", how)
    given = arguments("gpt_oss")
    y = layer(*given)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and same_bits(twin(*given), y)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other, twin = packed("gpt_oss", how)
    for parameter in (*twin.lora_parameters().values(), twin._parameters["down_proj"]):
        parameter.data.zero_()
    assert {"experts.down_proj", *(f"experts.down_proj_{part}" for part in twin.packed_stacks["down_proj"].format.beside)} <= state.keys()
    other.load_state_dict(state)
    assert same_bits(twin(*given), y)
    with pytest.raises(
        RuntimeError, match=r"experts.gate_up_proj: a weight in torch.float32 for experts that are quantized \(\w+\); load it"
    ):
        other.load_state_dict(build("gpt_oss").state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.down_proj_"):
        other.load_state_dict({key: value for key, value in state.items() if not key.startswith("experts.down_proj_")})
    half = copy.deepcopy(model).bfloat16()["experts"]
    assert half.packed_stacks["down_proj"].dtype == torch.bfloat16 and half.by_weight()["down_proj"].base_weight().dtype == torch.bfloat16
    rounded, scales = (each.packed_stacks["down_proj"].tensors for each in (half, layer))
    assert all(same_bits(rounded[part], scales[part]) for part in scales)
    assert (half(*arguments("gpt_oss", torch.bfloat16)) - y).norm() < 0.05 * y.norm()


@each_format
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_with_dropout_gives_the_same_gradients(how):
    plain, again = (
        dropout_gradients(quantize_base(tiny_qwen3_moe(implementation="grouped_mm", layers=1), how), checkpointed)
        for checkpointed in (False, True)
    )
    assert len(plain) == 6 and all(gradient.any() for gradient in plain)
    torch.testing.assert_close(plain, again)


@each_format
def test_a_model_is_the_same_base_with_the_same_numbers(how, tmp_path):
    """The report, the fingerprint, adapter folders both ways, and the base alone."""
    plain, model = tiny_qwen3_moe(layers=1), quantize_base(tiny_qwen3_moe(layers=1), how)
    everything = LoRAConfig(rank=2, target_modules="all-linear")
    one, two = find_targets(plain, everything), find_targets(model, everything)
    assert (one.reached, one.total, one.left_out, one.passed_over) == (two.reached, two.total, two.left_out, two.passed_over)
    assert "mlp.experts" in str(two) and not two.passed_over.keys() & {FQN} and one.reached > 0.7 * one.total
    assert base_identity(plain) == base_identity(model)
    base = model(IDS).logits
    apply_lora(model, CONFIG)
    assert same_bits(model(IDS).logits, base)
    fill(model, std=0.1)
    with disabled_lora(model):
        assert same_bits(model(IDS).logits, base)
    save_adapter(model, tmp_path / "ours")
    other = load_adapter(quantize_base(tiny_qwen3_moe(layers=1), how), tmp_path / "ours")
    assert same_bits(other(IDS).logits, model(IDS).logits)
    export_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    load_adapter(plain, tmp_path / "ours")
    for mine, theirs in zip(get_lora_parameters(plain), get_lora_parameters(model), strict=True):
        assert torch.equal(mine, theirs)


@each_format
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers so
def test_peft_computes_the_same_on_the_dequantized_base(how, tmp_path):
    import peft

    model = fill(
        apply_lora(quantize_base(tiny_qwen3_moe(layers=1), how), LoRAConfig(rank=2, alpha=6, target_modules="all-linear")), std=0.1
    )
    plain = tiny_qwen3_moe(layers=1)
    for name, module in plain.named_modules():
        twin = model.get_submodule(name)
        for key in format_of(twin).packed(twin) if format_of(twin) else ():
            module._parameters[key] = nn.Parameter(dequantized(single(twin, key)).clone())
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    torch.testing.assert_close(model.eval()(IDS).logits, theirs.eval()(IDS).logits, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_packed_is_named_and_nothing_changes():
    def refused(model, how, message):
        classes = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=message):
            quantize_base(model, how)
        assert {name: type(module) for name, module in model.named_modules()} == classes

    stacked = r"experts' \(Qwen3MoeExperts\) holds its weights in one tensor for all experts, .* not pack: use 'fp8' or 'nf4', or leave"
    for how in ("int8", "torchao-int8"):
        refused(tiny_qwen3_moe(layers=1), how, stacked)
    refused(test_experts.build("qwen3_moe"), "nf4", r"gate_up_proj with matrices of 240 entries, .* packs multiples of 64: .*'fp8'")
    refused(fill(apply_lora(tiny_qwen3_moe(layers=1), CONFIG)), "fp8", "has an adapter already: quantize the base first")
    tied = tiny_qwen3_moe(layers=1)
    tied.again = nn.Module()
    tied.again.weight = experts(tied).down_proj  # which is left out, and much of so small a model
    with pytest.warns(UserWarning, match="leaves out"):
        refused(tied, "fp8", r"shares its weight with again.weight")
    model = quantize_base(tiny_qwen3_moe(layers=1), "fp8")
    with pytest.raises(ValueError, match=r"modules_to_save: 'model.layers.0.mlp.experts' is quantized and cannot be trained in full"):
        apply_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["experts"]))


def test_dropout_acts_and_a_failure_in_quantizing_restores(monkeypatch):
    _, layer = packed("llama4", "fp8", dropout=0.4)
    (x,) = arguments("llama4")
    assert not torch.allclose(layer.train()(x), layer.train()(x)) and same_bits(layer.eval()(x), layer.eval()(x))
    model = tiny_qwen3_moe(layers=2)
    before = {name: p for name, p in model.named_parameters()}
    pack, done = quantize.pack_stacks, []
    monkeypatch.setattr(quantize, "pack_stacks", lambda *args: 1 / 0 if done else done.append(pack(*args)))
    with pytest.raises(ZeroDivisionError):
        quantize_base(model, "fp8")
    assert all(p is before[name] for name, p in model.named_parameters()) and len(before) == len(list(model.named_parameters()))
    assert type(experts(model)).__name__ == "Qwen3MoeExperts" and "packed_stacks" not in vars(experts(model))
