"""Merge, unmerge, report: all of it or nothing, and back to the bit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, merge_lora, merge_report, unload_lora, unmerge_lora
from lightning_lora.layers import lora_layers
from lightning_lora.model.ties import tied_weights
from tests.conftest import ALL, DTYPES, TinyModel, adapted, base_bits, fill, same_bits, snapshot


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge_a_model(make, ids, dtype):
    model = adapted(make(TinyModel).to(dtype), **ALL).eval()
    before, unmerged = base_bits(model), model(ids)
    assert merge_lora(model) is model
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 0.05)
    torch.testing.assert_close(model(ids), unmerged, rtol=tolerance, atol=tolerance * unmerged.abs().max().item())
    assert list(model.state_dict()) == list(make(TinyModel).state_dict())
    assert base_bits(model) != before
    merged = base_bits(model)
    merge_lora(model)  # a second time changes nothing
    assert base_bits(model) == merged
    assert unmerge_lora(model) is model
    assert base_bits(model) == before
    assert same_bits(model(ids), unmerged)


def test_the_report_says_what_rounding_lost(make):
    model = adapted(make(TinyModel).bfloat16(), **ALL)
    assert merge_report(model) == {}
    base = copy.deepcopy(model).float()
    merge_lora(model)
    report = merge_report(model)
    assert list(report) == [name for name, _ in lora_layers(model)]
    for name, layer in lora_layers(model):
        delta = base.get_submodule(name).lora_delta()
        lost = (layer.weight.float() - base.get_submodule(name).weight - delta).norm() / delta.norm()
        assert report[name] == pytest.approx(lost.item(), rel=1e-3)
        assert 0 < report[name] < 0.1
    unmerge_lora(model)
    assert merge_report(model) == {}


@pytest.mark.parametrize("reversible", [True, False])
def test_a_limit_on_what_rounding_loses(make, reversible):
    model = adapted(make(TinyModel).bfloat16(), **ALL)
    with torch.no_grad():
        model.layers[0].mlp.lora_B.mul_(1e-3)  # below the last digit of most entries
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers.0.mlp' loses \d+\.\d+% of its update by rounding, more than max_lost=0.3 \(1 of 7 wei"):
        merge_lora(model, max_lost=0.3, reversible=reversible)
    assert snapshot(model) == before
    merge_lora(model, max_lost=1.0, reversible=reversible)
    assert 0.3 < merge_report(model)["layers.0.mlp"] < 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_spoilt_adapter_and_nothing_is_merged(make, value):
    model = adapted(make(TinyModel), **ALL)
    with torch.no_grad():
        model.layers[1].mlp.lora_B[0, 0] = value  # the last one
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers.1.mlp' cannot be merged: lora_B holds NaN or infinity"):
        merge_lora(model)
    assert snapshot(model) == before


def test_merging_for_good_cannot_be_undone_and_says_so(make):
    model = merge_lora(adapted(make(TinyModel), **ALL), reversible=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'embed' cannot be unmerged: no undo record was kept"):
        unmerge_lora(model)
    assert snapshot(model) == before


def test_an_adapter_that_changed_is_named_and_no_layer_is_unmerged(make):
    model = merge_lora(adapted(make(TinyModel), **ALL))
    with torch.no_grad():
        model.layers[1].mlp.lora_B[0, 0] += 1
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers\.1\.mlp' cannot be unmerged: the base weight would not come back"):
        unmerge_lora(model)
    assert snapshot(model) == before


def test_a_merged_state_dict_loads_into_the_plain_model_and_an_adapters_into_a_merged_one(make, ids):
    model, other = adapted(make(TinyModel), **ALL), adapted(make(TinyModel), seed=2, **ALL)
    merge_lora(model)
    plain = make(TinyModel)
    plain.load_state_dict(model.state_dict())
    assert same_bits(plain(ids), model(ids))
    model.load_state_dict(other.state_dict())
    assert not any(layer.merged for _, layer in lora_layers(model))
    assert same_bits(model(ids), other(ids))


# Tied embeddings.

TIED = [["embed"], ["lm_head"], ["embed", "lm_head"], ["embed", "lm_head", "q_proj"]]


@pytest.mark.parametrize("targets", TIED)
def test_merging_a_tied_weight_is_refused(make, targets):
    model = adapted(make(TinyModel, tied=True), target_modules=targets, rank=2)
    before = snapshot(model)
    name, other = ("embed", "lm_head") if "embed" in targets else ("lm_head", "embed")
    with pytest.raises(ValueError, match=rf"{name}.weight is tied to {other}.weight: .* Pass untie=True"):
        merge_lora(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", TIED)
def test_untied_it_merges_right_and_ties_again(make, ids, targets, dtype):
    model = adapted(make(TinyModel, tied=True).to(dtype), target_modules=targets, rank=2).eval()
    before, unmerged, weight = base_bits(model), model(ids), model.embed.weight
    for _ in range(2):
        merge_lora(model, untie=True)
        assert model.embed.weight is not model.lm_head.weight
        torch.testing.assert_close(model(ids), unmerged, rtol=0.05, atol=1e-4 if dtype == torch.float32 else 0.3)
        assert not model.embed.weight.requires_grad
        merge_lora(model)
        unmerge_lora(model)
        assert model.embed.weight is model.lm_head.weight is weight
        assert base_bits(model) == before
        assert same_bits(model(ids), unmerged)
    assert set(tied_weights(model)) == {f"{name}.weight" for name in targets if name != "q_proj"}


class Sharing(nn.Module):
    """Three linears, and what ties one of them to something else through memory."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))
        whole = torch.randn(8, 4)
        if how == "data":
            self.b.weight.data = self.a.weight.data
        elif how == "overlap":
            self.a.weight, self.b.weight = nn.Parameter(whole[:4]), nn.Parameter(whole[2:6])
        elif how == "buffer":
            self.b.register_buffer("kept", self.a.weight.detach()[1:])
        elif how == "rows apart":
            self.a.weight, self.b.weight = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])
        elif how == "columns apart":
            self.a.weight, self.b.weight = (nn.Parameter(part) for part in torch.randn(4, 8).chunk(2, dim=1))

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x)


@pytest.mark.parametrize(("how", "other"), [("data", "b.weight"), ("overlap", "b.weight"), ("buffer", "b.kept")])
def test_weights_tied_through_memory_are_refused_or_untied(how, other):
    model = adapted(Sharing(how), target_modules=["a", "c"], rank=2)
    before, x = snapshot(model), torch.randn(3, 4)
    with pytest.raises(ValueError, match=rf"a.weight is tied to {other}: .* Pass untie=True"):
        merge_lora(model)
    assert snapshot(model) == before
    wanted = model(x)
    merge_lora(model, untie=True)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("how", ["rows apart", "columns apart"])
def test_views_of_one_tensor_that_do_not_overlap_merge_freely(how):
    model = adapted(Sharing(how), target_modules=["a", "b"], rank=2)
    x = torch.randn(3, 4)
    wanted = model(x)
    torch.testing.assert_close(merge_lora(model)(x), wanted, rtol=1e-5, atol=1e-5)


def test_layers_beside_a_tied_pair_merge_freely(make):
    merge_lora(adapted(make(TinyModel, tied=True), target_modules=["q_proj"], rank=2))


def test_transformers_does_not_tie_a_merged_model_again(tmp_path):
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    model = adapted(LlamaForCausalLM(config).eval(), target_modules=["embed_tokens", "q_proj"], rank=2)
    ids = torch.tensor([[1, 2, 3]])
    unmerged = model(ids).logits
    merge_lora(model, untie=True)
    model.tie_weights()
    torch.testing.assert_close(model(ids).logits, unmerged)
    unload_lora(model, merged="keep").save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, unmerged)


def test_unmerging_gives_transformers_its_tie_back(tmp_path):
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    model = adapted(LlamaForCausalLM(config), target_modules=["embed_tokens"], rank=2)
    unmerge_lora(merge_lora(model, untie=True))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


COMPUTED = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight")),
    "weight_norm": (parametrizations.weight_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    "parametrized": (
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh(), unsafe=True),
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_came_to_be_computed_is_merged_into_only_once_it_is_permanent(how):
    """Written to such a weight, an update would be lost at the next call."""
    compute, make_permanent = COMPUTED[how]
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    fill(apply_lora(model, LoRAConfig(rank=2, target_modules=["0", "2"])))
    compute(model[2])
    x = torch.randn(3, 8)
    model(x)
    before, unmerged = snapshot(model), model(x)
    with pytest.raises(ValueError, match=r"^'2' cannot be merged: it computes its weight anew at each call .* remove it\.$"):
        merge_lora(model)
    assert snapshot(model) == before and not model[0].merged and same_bits(model(x), unmerged)
    make_permanent(model[2])
    torch.testing.assert_close(merge_lora(model)(x), unmerged, rtol=1e-5, atol=1e-5)


def test_a_weight_that_was_pruned_after_its_adapter_was_made_is_named():
    model = fill(apply_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), LoRAConfig(rank=2, target_modules=["0", "1"])))
    model[1].weight, model[1].bias = nn.Parameter(torch.ones(3, 8)), None
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"^'1' cannot be merged: its weight has shape \(3, 8\), but .* say \(4, 8\).* before apply_lora\.$"
    ):
        merge_lora(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("do", [merge_lora, unmerge_lora])
def test_a_model_without_adapters_is_refused(do, make):
    with pytest.raises(ValueError, match=r"TinyModel has no LoRA layers to (un)?merge; call load_adapter\(model, folder\) or apply_lora"):
        do(make(TinyModel))
