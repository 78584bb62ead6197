"""Every kind merges to the exact sum rounded once, comes back to the bit, and is a plain layer to the outside while merged."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.registry import KIND_NAMES, KINDS, qualified_name, register_kind
from lightning_lora.utils.checksums import sampled_digest
from tests.conftest import fill, same_bits
from tests.layers.kinds import CASES, every_dtype, every_kind


@every_kind
@every_dtype
def test_merge_equals_unmerged_and_unmerge_is_exact(kind, dtype):
    case = CASES[kind]
    layer, x = case.layer(dtype).eval(), case.x(dtype)
    with torch.no_grad():
        layer.lora_B.mul_(0.3)
    base, unmerged = layer.weight.detach().clone(), layer(x)
    adapter = {name: p.detach().clone() for name, p in layer.lora_parameters().items()}
    if getattr(layer, "padding_idx", None) is not None:
        layer.lora_A.data[:, layer.padding_idx] = 0
        unmerged = layer(x)
    for _ in range(2):
        layer.merge_weights()
        assert layer.merged
        assert not same_bits(layer.weight, base)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 16 * torch.finfo(dtype).eps)
        assert (layer(x) - unmerged).double().norm() <= tolerance * unmerged.double().norm()
        layer.merge_weights()  # once is enough
        layer.unmerge_weights()
        assert not layer.merged
        assert same_bits(layer.weight, base)
        assert same_bits(layer(x), unmerged)
        layer.unmerge_weights()
    assert all(same_bits(p, adapter[name]) for name, p in layer.lora_parameters().items() if name == "lora_B")


@every_kind
def test_the_merged_weight_is_the_exact_sum_rounded_once(kind):
    layer = CASES[kind].layer(torch.bfloat16)
    with torch.no_grad():
        layer.lora_B.mul_(0.1)
    exact = layer.weight.double() + copy.deepcopy(layer).double().lora_delta()
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge_weights()
    assert torch.get_float32_matmul_precision() == "medium"
    differs = layer.weight != exact.to(torch.bfloat16)  # but for sums that fall next to the middle of two bf16 numbers
    assert differs.double().mean() < 0.02
    assert layer.weight.dtype == torch.bfloat16
    lost = (layer.weight.double() - exact).norm() / copy.deepcopy(layer).double().lora_delta().norm()
    assert layer.merge_loss == pytest.approx(lost.item(), rel=0.05)
    assert not layer.weight.requires_grad


def test_the_product_is_full_precision_whatever_the_user_set():
    """TF32 or bf16 products, autocast: the merged weight is that of no settings, and the base comes back under any."""
    layer, plain = CASES["linear"].layer(), CASES["linear"].layer()
    base = layer.weight.detach().clone()
    plain.merge_weights()
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge_weights()
    assert same_bits(layer.weight, plain.weight)
    with torch.autocast("cpu", torch.bfloat16):
        layer.unmerge_weights()
    assert same_bits(layer.weight, base)


def test_merging_for_good():
    layer = CASES["linear"].layer()
    layer.merge_weights(reversible=False)
    merged = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="no undo record was kept"):
        layer.unmerge_weights()
    assert layer.merged
    assert same_bits(layer.weight, merged)


def test_an_adapter_that_changed_after_the_merge_is_not_taken_out():
    layer = CASES["linear"].layer()
    layer.merge_weights()
    merged = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B[0, 0] += 1
    with pytest.raises(ValueError, match="would not come back bit for bit"):
        layer.unmerge_weights()
    assert layer.merged
    assert same_bits(layer.weight, merged)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_spoilt_adapter_is_not_merged(value):
    layer = CASES["linear"].layer()
    with torch.no_grad():
        layer.lora_A[0, 0] = value
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="lora_A holds NaN or infinity"):
        layer.merge_weights()
    assert not layer.merged
    assert same_bits(layer.weight, before)


def test_a_quantized_weight_is_not_merged():
    layer = CASES["linear"].layer()
    layer.weight = nn.Parameter(torch.zeros(10, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"the weight is quantized \(torch.int8\)"):
        layer.merge_weights()
    assert layer.weight.count_nonzero() == 0


def test_merging_on_a_named_device_comes_home():
    layer = CASES["linear"].layer()
    base = layer.weight.detach().clone()
    layer.merge_weights(device="cpu")
    layer.unmerge_weights()
    assert same_bits(layer.weight, base)


def test_the_way_back_of_a_converted_layer_is_refused():
    layer = CASES["linear"].layer()
    layer.merge_weights()
    layer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="would not come back bit for bit"):
        layer.unmerge_weights()


@every_kind
def test_the_digest_of_the_base_is_kept_while_it_is_merged(kind):
    layer = CASES[kind].layer()
    before = sampled_digest(layer.weight)
    assert layer.base_weight_digest is None
    layer.merge_weights()
    assert layer.base_weight_digest == before != sampled_digest(layer.weight)


# State dicts.


@every_kind
def test_state_dict_keys_are_the_bases_and_two_more(kind):
    case = CASES[kind]
    base = case.base().state_dict()
    layer = case.layer()
    assert list(layer.state_dict()) == [*base, "lora_A", "lora_B"]
    layer.merge_weights()
    assert list(layer.state_dict()) == list(base)
    plain = case.base()
    plain.load_state_dict(layer.state_dict())
    assert same_bits(plain(case.x()), layer(case.x()))


@every_kind
def test_loading_an_adapter_into_a_merged_layer_unmerges_it_first(kind):
    case = CASES[kind]
    layer, other = case.layer(), case.layer()
    fill(other, seed=2)
    base = layer.weight.detach().clone()
    layer.merge_weights()
    layer.load_state_dict(other.state_dict())
    assert not layer.merged
    assert same_bits(layer.weight, base)
    assert same_bits(layer(case.x()), other(case.x()))


def test_loading_only_the_adapter_into_a_merged_layer_brings_the_base_back():
    case = CASES["linear"]
    layer, base = case.layer(), case.base()
    layer.merge_weights()
    layer.load_state_dict({"lora_A": torch.zeros(4, 12), "lora_B": torch.zeros(10, 4)}, strict=False)
    assert same_bits(layer(case.x()), base(case.x()))


def test_loading_merged_weights_into_a_merged_layer_gives_up_the_way_back():
    case = CASES["linear"]
    layer = case.layer()
    layer.merge_weights()
    result = layer.load_state_dict(case.base().state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert same_bits(layer(case.x()), case.base()(case.x()))
    with pytest.raises(ValueError, match="other weights were loaded since"):
        layer.unmerge_weights()


def test_a_failed_load_keeps_the_way_back():
    layer = CASES["linear"].layer()
    base = layer.weight.detach().clone()
    layer.merge_weights()
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"weight": torch.zeros(3, 3), "bias": torch.zeros(10)})
    layer.unmerge_weights()
    assert same_bits(layer.weight, base)


def test_loading_into_an_unmerged_layer_is_strict_about_the_adapter():
    layer = CASES["linear"].layer()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "lora_A", "lora_B"'):
        layer.load_state_dict(CASES["linear"].base().state_dict())


class Two(nn.Module):
    """Two weights, one the name's end of the other."""

    def __init__(self):
        super().__init__()
        self.proj, self.up_proj = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 6))


class Single(LoRALayer):
    lora_base = nn.Module

    @classmethod
    def adapter_shapes(cls, module, spec):
        return (spec.rank, module.weight.shape[1]), (module.weight.shape[0], spec.rank)


class LoRATwo(SeveralWeights):
    adapted = ("proj", "up_proj")
    weight_kind = Single


@pytest.fixture
def kind_of_two():
    register_kind(Two, name="test_two")(LoRATwo)
    yield
    del KINDS[qualified_name(Two)], KIND_NAMES["test_two"]


@pytest.mark.usefixtures("kind_of_two")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fields", [{"variant": "dora"}, {"init": "olora"}, {"init": "pissa", "variant": "dora"}], ids=str)
def test_base_weights_that_come_later_are_followed_one_by_one(fields, assign):
    """What an adapter takes from a weight (DoRA's m, a kept start) it takes again from the one that is loaded, unless it has trained."""
    config = LoRAConfig(rank=2, target_modules=["two"], **fields)
    model, other, third = (nn.ModuleDict({"two": Two()}) for _ in range(3))
    weights, more = ({name: p.detach().clone() for name, p in each.named_parameters()} for each in (other, third))
    apply_lora(model, config)
    layer, from_weight = model["two"], ["lora_magnitude_vector"] if "init" not in fields else ["lora_A", "lora_B0"]

    def taken(module, weight):
        return torch.cat([module._parameters[f"{name}_{weight}"].detach().flatten() for name in from_weight])

    fresh, before = apply_lora(other, config)["two"], taken(layer, "up_proj")
    model.load_state_dict({"two.proj": weights["two.proj"]}, strict=False, assign=assign)
    assert torch.equal(taken(layer, "proj"), taken(fresh, "proj")) and torch.equal(taken(layer, "up_proj"), before)
    model.load_state_dict(weights, assign=assign)
    assert torch.equal(taken(layer, "up_proj"), taken(fresh, "up_proj"))
    nn.init.normal_(layer.lora_B_proj)
    model.load_state_dict(more, strict=False, assign=assign)
    assert torch.equal(taken(layer, "proj"), taken(fresh, "proj"))
    assert torch.equal(taken(layer, "up_proj"), taken(apply_lora(third, config)["two"], "up_proj"))
    saved = model.state_dict()
    model.load_state_dict({**saved, **weights}, assign=assign)
    assert all(torch.equal(model.state_dict()[key], saved[key]) for key in saved if key not in weights), "loaded together with the weight"
