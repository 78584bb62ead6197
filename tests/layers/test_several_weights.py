"""A module with several weights, proved by the experts of transformers' mixtures: one layer, exact in each weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora import LoRAConfig, apply_lora, merge_lora, unmerge_lora
from lightning_lora.layers.adapting import refusal
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model.merge import unmerged
from lightning_lora.model.ties import tied_weights
from lightning_lora.strategies.digests import digest, is_merged
from tests.conftest import adapted, base_bits, fill, same_bits, snapshot
from tests.layers.experts import LoRAExperts, registered, tiny_qwen3_moe
from tests.layers.mixtures import CONFIG, FQN, IDS, MODELS, every_model, experts, one_layer, routed


@pytest.fixture(autouse=True)
def with_the_kind():
    with registered():
        yield


def definition(layer, x, index, share, factors):
    """Token by token: Σ share · D(act(G x) ∘ U x), each weight W_e + s·B_e·A_e."""
    s, out = layer.scaling, []

    def times(name, e, v):
        W, A, B = layer._parameters[name][e], factors[f"lora_A_{name}"], factors[f"lora_B_{name}"]
        A, B = A.reshape(layer.num_experts, -1, A.shape[1])[e], B.reshape(layer.num_experts, -1, B.shape[1])[e]
        return W @ v + s * (B @ (A @ v))

    for n in range(len(x)):
        total = 0
        for k in range(index.shape[1]):
            gate, up = times("gate_up_proj", index[n, k], x[n]).chunk(2)
            total = total + share[n, k] * times("down_proj", index[n, k], nn.functional.silu(gate) * up)
        out.append(total)
    return torch.stack(out)


# The layer.


@every_model
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_an_adapted_model_starts_as_its_base_to_the_bit(model, implementation):
    model = MODELS[model](implementation=implementation)
    before = model(IDS).logits
    apply_lora(model, config=CONFIG)
    assert same_bits(model(IDS).logits, before)
    fill(model)
    assert (model(IDS).logits - before).abs().max() > 1e-3


def test_outputs_and_gradients_are_those_of_the_definition():
    layer = one_layer()["experts"].double()
    for name, factor in layer.lora_parameters().items():
        layer._parameters[name] = nn.Parameter(factor.double())
    x, index, share = routed(layer, torch.float64)
    x.requires_grad_()
    factors = {name: p.detach().clone().requires_grad_() for name, p in layer.lora_parameters().items()}
    wanted, found = definition(layer, x, index, share, factors), layer(x, index, share)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn(found.shape, dtype=torch.float64)
    theirs = torch.autograd.grad((wanted * weight).sum(), [x, *factors.values()])
    mine = torch.autograd.grad((found * weight).sum(), [x, *layer.lora_parameters().values()])
    torch.testing.assert_close(mine, theirs)
    assert all(gradient.any() for gradient in mine)


def test_each_weight_is_a_layer_of_its_own_inside():
    layer = one_layer()["experts"]
    shapes = {name: tuple(p.shape) for name, p in layer.lora_parameters().items()}
    assert shapes == {
        "lora_A_gate_up_proj": (16, 32),
        "lora_B_gate_up_proj": (256, 2),
        "lora_A_down_proj": (16, 16),
        "lora_B_down_proj": (256, 2),
    }
    parts = layer.by_weight()
    assert list(parts) == ["gate_up_proj", "down_proj"]
    for name, part in parts.items():
        assert part.weight is layer._parameters[name]
        assert (part.lora_A, part.lora_B) == (layer._parameters[f"lora_A_{name}"], layer._parameters[f"lora_B_{name}"])
        assert not part.weight.requires_grad and part.rank == 2 and part.num_experts == 8


def test_a_weight_whose_name_ends_anothers_keeps_its_own_factors():
    class Both(SeveralWeights):
        adapted = ("proj", "down_proj")

    names = dict.fromkeys(["proj", "lora_A_proj", "lora_A_down_proj", "lora_magnitude_vector_down_proj"])
    assert Both._names(names, "proj") == {"lora_A": "lora_A_proj"}
    assert Both._names(names, "down_proj") == {"lora_A": "lora_A_down_proj", "lora_magnitude_vector": "lora_magnitude_vector_down_proj"}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(merged, copied):
    layer = one_layer()["experts"]
    arguments, base = routed(layer), base_bits(layer)
    if merged:
        layer.merge_weights()
    twin = copied(layer)
    assert type(twin) is type(layer) and twin.merged is merged and same_bits(twin(*arguments), layer(*arguments))
    twin.unmerge_weights()
    assert base_bits(twin) == base and layer.merged is merged


# Variants see one weight at a time.


@pytest.mark.parametrize("variant", ["dora", "lora_fa"])
def test_variants_work_in_each_weight(variant):
    model = tiny_qwen3_moe()
    before, base = model(IDS).logits, base_bits(model)
    apply_lora(model, config=LoRAConfig(rank=2, target_modules=["experts"], variant=variant))
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-5)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    parts = {"dora": ["lora_A", "lora_B", "lora_magnitude_vector"], "lora_fa": ["lora_B"]}[variant]
    assert trained == {f"{part}_{name}" for part in parts for name in LoRAExperts.adapted}
    with torch.no_grad():
        for p in ll.get_lora_parameters(model):
            p.add_(torch.randn(p.shape) * 0.1)
    unmerged = model(IDS).logits
    torch.testing.assert_close(merge_lora(model)(IDS).logits, unmerged, rtol=0, atol=1e-5)
    assert base_bits(unmerge_lora(model)) == base


def test_what_does_not_fit_is_refused_with_the_weights_name():
    module = experts(tiny_qwen3_moe())

    def message(module, **fields):
        return refusal(module, LayerSpec(LoRAConfig(**fields), 2, 4.0, "mlp.experts"))

    assert "gate_up_proj: variant='adalora' pairs" in message(module, dropout=0.0, variant="adalora")
    assert "gate_up_proj: dropout=0.1 has no input" in message(module, dropout=0.1)
    module._parameters["down_proj"] = nn.Parameter(torch.zeros(4, 4))
    assert "down_proj: its shape (4, 4)" in message(module, dropout=0.0)
    del module._parameters["down_proj"]
    assert "computes its down_proj anew at each call" in message(module, dropout=0.0)


# Merging.


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_exact_sum_rounded_once_and_unmerge_is_exact(model, dtype):
    model = fill(apply_lora(MODELS[model](dtype), config=CONFIG), std=0.1).eval()
    layer, base, unmerged = experts(model), base_bits(model), model(IDS).logits
    exact = {}
    for name, part in layer.by_weight().items():
        A, B = (factor.double().unflatten(0, (layer.num_experts, -1)) for factor in (part.lora_A, part.lora_B))
        exact[name] = part.weight.double() + part.scaling * B @ A
    for _ in range(2):
        merge_lora(model)
        assert layer.merged
        for name, wanted in exact.items():
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(layer._parameters[name].double(), wanted, rtol=eps, atol=eps / 8)
        assert not any("lora_" in name for name in model.state_dict())
        torch.testing.assert_close(model(IDS).logits, unmerged, rtol=0.05, atol=1e-5 if dtype == torch.float32 else 0.1)
        unmerge_lora(model)
        assert base_bits(model) == base and same_bits(model(IDS).logits, unmerged)
    records = merge_lora(model) and [state.merge for state in layer.lora_state.by_weight.values()]
    assert len({record.digest for record in records}) == 2 and all(record.undo is not None for record in records)
    losses = [record.loss for record in records]
    assert ll.merge_report(model)[FQN] == max(losses) and (dtype == torch.float32 or min(losses) > 1e-3)


@pytest.mark.parametrize("spoilt", ["lora_A_gate_up_proj", "lora_B_down_proj"])
def test_an_unmerge_that_fails_in_one_weight_changes_none(spoilt):
    model = one_layer()
    merge_lora(model)
    with torch.no_grad():
        model["experts"]._parameters[spoilt][0, 0] += 1
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"'experts' cannot be unmerged: {spoilt[7:]}: the base weight would not come back"):
        unmerge_lora(model)
    assert snapshot(model) == before and model["experts"].merged


def test_a_merge_that_one_weight_refuses_changes_none():
    model = one_layer()
    with torch.no_grad():
        model["experts"].lora_A_down_proj[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="'experts' cannot be merged: down_proj: lora_A holds NaN"):
        merge_lora(model)
    assert snapshot(model) == before


def test_state_dicts_of_a_merged_layer():
    model = one_layer()
    state, base = copy.deepcopy(model.state_dict()), base_bits(model)
    merge_lora(model)
    merged = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)  # an adapter is coming: it belongs on the base
    assert not model["experts"].merged and base_bits(model) == base
    merge_lora(model)
    model.load_state_dict({"experts.down_proj": merged["experts.down_proj"] + 1}, strict=False)
    with pytest.raises(ValueError, match="down_proj: no undo record was kept"):
        unmerge_lora(model)
    assert same_bits(model["experts"].gate_up_proj, merged["experts.gate_up_proj"])


def test_a_tied_weight_is_replaced_and_tied_again():
    model = nn.ModuleDict({name: experts(tiny_qwen3_moe()) for name in ("a", "b")})
    shared = model["a"].down_proj
    model["b"]._parameters["down_proj"] = shared
    adapted(model, rank=2, target_modules=["a"])
    base = base_bits(model)
    assert tied_weights(model) == {"a.down_proj": ["b.down_proj"]}
    with pytest.raises(ValueError, match=r"a.down_proj is tied to b.down_proj"):
        merge_lora(model)
    merge_lora(model, untie=True)
    assert model["a"].down_proj is not shared and model["b"].down_proj is shared
    unmerge_lora(model)
    assert model["a"].down_proj is shared and base_bits(model) == base


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_each_of_several_weights_is_told_from_its_base(variant):
    """What checkpoints ask of a merged layer: the digest of each base weight, and the base alone once more (a module's ``setup``)."""
    model = one_layer(variant=variant)
    layer = model["experts"]
    names = layer.adapted
    before = {name: digest(layer, name, layer._parameters[name]) for name in names}
    base = {f"experts.{name}": layer._parameters[name].detach().clone() for name in names}
    x, index, share = routed(layer)
    merge_lora(model)
    assert all(is_merged(layer, name) for name in names)
    assert {name: digest(layer, name, layer._parameters[name]) for name in names} == before
    merged = layer(x, index, share)
    layer.lora_base_again = True
    assert not model.load_state_dict(base).missing_keys and layer.merged
    assert same_bits(layer(x, index, share), merged), "what is merged stays"
    del layer.lora_base_again
    with unmerged(model):
        assert {name: digest(layer, name, layer._parameters[name]) for name in names} == before
    assert same_bits(layer(x, index, share), merged)
    assert not model.load_state_dict(model.state_dict()).missing_keys
    with pytest.raises(ValueError, match="no undo record was kept"):
        unmerge_lora(model)
