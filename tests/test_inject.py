"""apply, list, merge, unmerge, unload: all of it or nothing, and back to the bit."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    find_targets,
    get_lora_parameters,
    inject,
    merge_lora,
    merge_report,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.inject import trainable_parameters
from lightning_lora.layers import lora_layers
from lightning_lora.merge_model import tied_weights
from lightning_lora.registry import INITS
from tests.conftest import ConvNet, Task, TinyModel, adapted, as_bits, fill, same_bits, snapshot

ALL = {"target_modules": ["q_proj", "v_proj", "mlp", "embed"], "rank": 4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weights(model):
    return {name: as_bits(tensor) for name, tensor in model.state_dict().items() if "lora_" not in name}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Applying.


def test_the_adapted_model_starts_as_the_base_and_only_adapters_train(make, ids):
    model, base = apply_lora(make(TinyModel), config=LoRAConfig(**ALL)), make(TinyModel)
    assert same_bits(model(ids), base(ids))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    assert len(trained) == 2 * 7
    assert set(base.state_dict()) == {name for name in model.state_dict() if "lora_" not in name}
    assert trainable_parameters(model) == (
        sum(p.numel() for p in get_lora_parameters(model)),
        sum(p.numel() for p in model.parameters()),
    )


def test_apply_returns_the_same_model_and_has_a_default_config(make):
    model = make(TinyModel)
    assert apply_lora(model) is model
    assert [layer.lora_config for _, layer in lora_layers(model)] == [LoRAConfig()] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_the_base_is_respected(make, ids, dtype):
    model = adapted(make(TinyModel).to(dtype), **ALL)
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in get_lora_parameters(model)} == {adapter}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {dtype}
    assert model(ids).dtype == dtype


def test_device_of_the_base_is_respected():
    with torch.device("meta"):
        model = TinyModel()
    assert {p.device.type for p in get_lora_parameters(apply_lora(model))} == {"meta"}


def test_training_lowers_the_loss_and_leaves_the_base_alone(make, ids):
    model = apply_lora(make(TinyModel), config=LoRAConfig(**ALL))
    before = weights(model)
    optimizer = torch.optim.Adam(get_lora_parameters(model), lr=0.05)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert equal(weights(model), before)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {f"layers.{i}.attn.{p}.bias" for i in (0, 1) for p in ("q_proj", "v_proj")}),
        ("all", {f"layers.{i}.{p}.bias" for i in (0, 1) for p in ("attn.q_proj", "attn.v_proj", "mlp", "norm")}),
    ],
)
def test_bias(make, bias, expected):
    model = apply_lora(make(TinyModel), config=LoRAConfig(bias=bias))
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == expected


def test_modules_to_save_train_in_full(make):
    model = apply_lora(make(TinyModel), config=LoRAConfig(modules_to_save=["lm_head", "norm"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"lm_head.weight", *(f"layers.{i}.norm.{p}" for i in (0, 1) for p in ("weight", "bias"))}


def test_applying_the_same_config_again_changes_nothing(make):
    model = adapted(make(TinyModel), **ALL)
    before = snapshot(model)
    assert apply_lora(model, config=LoRAConfig(**ALL)) is model
    assert apply_lora(model, config=LoRAConfig(**ALL, allow_unmatched=True)) is model
    assert snapshot(model) == before


def test_another_config_is_refused_and_says_what_differs(make):
    model = adapted(make(TinyModel), **ALL)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'embed' has another LoRA config \(rank: 4 != 2\); call unload_lora\(model\)"):
        apply_lora(model, config=LoRAConfig(**{**ALL, "rank": 2}))
    assert snapshot(model) == before
    unload_lora(model)
    assert apply_lora(model, config=LoRAConfig(**{**ALL, "rank": 2})).embed.rank == 2


@pytest.mark.parametrize("rank", [4, 2])
def test_applying_to_a_merged_model_is_refused(make, rank):
    model = merge_lora(adapted(make(TinyModel), **ALL))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"LoRA is merged into 'embed' and 6 more; call unmerge_lora\(model\) or unload_lora"):
        apply_lora(model, config=LoRAConfig(**{**ALL, "rank": rank}))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "nope"]}, "'nope' matches no module"),
        ({"init": "pissa2"}, "init='pissa2' is not known; there are gaussian, kaiming"),
        ({"variant": "nope"}, "variant='nope' is not known; there are .*plain"),
        ({"target_modules": ["q_proj", "norm"]}, "which LoRA cannot adapt"),
    ],
)
def test_a_refused_config_changes_nothing(make, fields, message):
    model = make(TinyModel)
    model.embed.requires_grad_(False)
    model.lm_head.eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, config=LoRAConfig(**fields))
    assert snapshot(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 2, 7])
def test_a_failure_in_the_middle_of_injection_changes_nothing(make, monkeypatch, error, after):
    calls = []

    def breaking(layer):
        calls.append(layer)
        if len(calls) == after:
            raise error("out of memory")
        INITS["kaiming"](layer)

    monkeypatch.setitem(INITS, "breaking", breaking)
    model = make(TinyModel)
    model.embed.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error):
        apply_lora(model, config=LoRAConfig(**ALL, init="breaking"))
    assert len(calls) == after
    assert snapshot(model) == before
    assert apply_lora(model, config=LoRAConfig(**ALL)) is model


def test_a_failure_after_the_last_layer_changes_nothing(make, monkeypatch):
    monkeypatch.setattr(inject, "_guard_resize", lambda model: 1 / 0)
    model = make(TinyModel)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        apply_lora(model, config=LoRAConfig(bias="all", modules_to_save=["lm_head"]))
    assert snapshot(model) == before


def test_a_model_inside_another(make, ids):
    task = Task(make(TinyModel))
    apply_lora(task.model, config=LoRAConfig(target_modules=["q_proj"]))
    assert [name for name, _ in lora_layers(task)] == ["model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj"]
    assert same_bits(task(ids), make(TinyModel)(ids))


# Listing.


def test_get_lora_parameters_is_a_sequence_with_membership_by_identity(make):
    model = adapted(make(TinyModel), target_modules=["q_proj"], rank=2)
    parameters = get_lora_parameters(model)
    first = model.layers[0].attn.q_proj
    assert len(parameters) == 4
    assert parameters[0] is first.lora_A
    assert list(parameters)[1] is first.lora_B
    assert [p is q for p, q in zip(parameters[1:3], list(parameters)[1:3], strict=True)] == [True, True]
    assert first.lora_B in parameters[1:3]
    assert first.lora_A not in parameters[1:3]
    assert all(p in parameters for p in parameters)
    assert first.weight not in parameters
    assert first.lora_A.detach().clone() not in parameters  # an equal tensor is another tensor
    assert all(name.endswith(("lora_A", "lora_B")) == (p in parameters) for name, p in model.named_parameters())
    assert "lora_A" not in parameters
    torch.optim.SGD(parameters, lr=0.1)


def test_a_plain_model_has_none(make):
    assert len(get_lora_parameters(make(TinyModel))) == 0


def test_a_shared_layers_parameters_come_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert len(get_lora_parameters(apply_lora(model, config=LoRAConfig(target_modules=["a"], rank=2)))) == 2


# Merging.


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge_a_model(make, ids, dtype):
    model = adapted(make(TinyModel).to(dtype), **ALL).eval()
    before, unmerged = weights(model), model(ids)
    assert merge_lora(model) is model
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 0.05)
    torch.testing.assert_close(model(ids), unmerged, rtol=tolerance, atol=tolerance * unmerged.abs().max().item())
    assert list(model.state_dict()) == list(make(TinyModel).state_dict())
    assert not equal(weights(model), before)
    merged = weights(model)
    merge_lora(model)  # a second time changes nothing
    assert equal(weights(model), merged)
    assert unmerge_lora(model) is model
    assert equal(weights(model), before)
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
    with pytest.raises(ValueError, match="'embed' cannot be unmerged: the way back was not kept"):
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
    before, unmerged, weight = weights(model), model(ids), model.embed.weight
    for _ in range(2):
        merge_lora(model, untie=True)
        assert model.embed.weight is not model.lm_head.weight
        torch.testing.assert_close(model(ids), unmerged, rtol=0.05, atol=1e-4 if dtype == torch.float32 else 0.3)
        assert not model.embed.weight.requires_grad
        merge_lora(model)
        unmerge_lora(model)
        assert model.embed.weight is model.lm_head.weight is weight
        assert equal(weights(model), before)
        assert same_bits(model(ids), unmerged)
    assert set(tied_weights(model)) == {name for name in targets if name != "q_proj"}


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
    unload_lora(model).save_pretrained(tmp_path)
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


# Taking it out.


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_unload(make, ids, merged, tied):
    model, base = adapted(make(TinyModel, tied=tied), **ALL).eval(), make(TinyModel, tied=tied).eval()
    unmerged = model(ids)
    if merged:
        merge_lora(model, untie=tied)
    assert unload_lora(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in base.named_modules()}
    assert {name: sorted(m.__dict__) for name, m in model.named_modules()} == {name: sorted(m.__dict__) for name, m in base.named_modules()}
    assert list(model.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(model(ids), unmerged if merged else base(ids))
    assert equal(weights(model), weights(base)) is not merged
    assert not any(p.requires_grad for p in model.parameters())
    unload_lora(model)
    apply_lora(model, config=LoRAConfig(**ALL))
    assert len(get_lora_parameters(model)) == 14


def test_unload_keeps_a_trained_head_trained(make):
    model = apply_lora(make(TinyModel), config=LoRAConfig(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not unload_lora(model).lm_head.weight.count_nonzero()


# Resizing.


def test_resizing_embeddings_under_an_adapter_is_refused():
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = adapted(LlamaForCausalLM(config), target_modules=["embed_tokens"], rank=2)
    with pytest.raises(ValueError, match=r"resize before apply_lora, or call unload_lora\(model\) first"):
        model.resize_token_embeddings(20)
    unload_lora(model).resize_token_embeddings(20)
    assert model.get_input_embeddings().weight.shape == (20, 8)


def test_resizing_beside_adapters_goes_on():
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = adapted(LlamaForCausalLM(config), target_modules=["q_proj"], rank=2)
    model.resize_token_embeddings(20)
    assert model.get_input_embeddings().weight.shape == (20, 8)


# Other models.


def test_a_convolutional_net_from_apply_to_unload():
    torch.manual_seed(0)
    model, x = ConvNet().eval(), torch.randn(2, 3, 6, 6)
    base, y = weights(model), model(x)
    adapted(model, target_modules=["conv", "head"], rank=2)
    unmerged = model(x)
    assert not torch.equal(unmerged, y)
    merge_lora(model)
    torch.testing.assert_close(model(x), unmerged)
    unload_lora(unmerge_lora(model))
    assert equal(weights(model), base)


def test_copies_of_an_adapted_model_are_adapted(make, ids):
    model = adapted(make(TinyModel, tied=True), target_modules=["embed", "q_proj"], rank=2)
    twin = copy.deepcopy(model)
    assert twin.embed.weight is twin.lm_head.weight
    assert apply_lora(twin, config=LoRAConfig(target_modules=["embed", "q_proj"], rank=2)) is twin
    fill(twin, seed=5)
    assert not torch.equal(twin(ids), model(ids))
    merge_lora(twin, untie=True)
    again = copy.deepcopy(twin)
    unmerge_lora(again)
    assert again.embed.weight is again.lm_head.weight
    assert twin.embed.merged


def test_injecting_does_what_find_targets_reported(make):
    model, config = make(TinyModel), LoRAConfig(**ALL)
    report = find_targets(model, config)
    apply_lora(model, config=config)
    assert [t.fqn for t in report.targets] == [name for name, _ in lora_layers(model)]
