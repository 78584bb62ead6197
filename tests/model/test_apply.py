"""apply and list: all of it or nothing (unload: test_unload.py)."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, find_targets, get_lora_parameters, merge_lora, unload_lora, unmerge_lora
from lightning_lora.layers import lora_layers
from lightning_lora.model import apply
from lightning_lora.model.apply import trainable_parameters
from lightning_lora.registry import INITS
from tests.conftest import ALL, DTYPES, ConvNet, Task, TinyModel, adapted, base_bits, fill, same_bits, snapshot

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
    before = base_bits(model)
    optimizer = torch.optim.Adam(get_lora_parameters(model), lr=0.05)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert base_bits(model) == before


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
        ({"init": "pissa2"}, "init='pissa2' is not known; there are corda, eva, gaussian, kaiming"),
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
    monkeypatch.setattr(apply, "guard", lambda model: 1 / 0)
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
    base, y = base_bits(model), model(x)
    adapted(model, target_modules=["conv", "head"], rank=2)
    unmerged = model(x)
    assert not torch.equal(unmerged, y)
    merge_lora(model)
    torch.testing.assert_close(model(x), unmerged)
    unload_lora(unmerge_lora(model))
    assert base_bits(model) == base


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("targets", ["0", "all-linear"])
def test_scripted_parts_stay_as_they_are(targets):
    model = nn.Sequential(nn.Linear(4, 16), torch.jit.script(nn.Sequential(nn.Linear(16, 1), nn.ReLU())))
    x = torch.randn(2, 4)
    before = model(x)
    apply_lora(model, LoRAConfig(rank=2, target_modules=targets))
    model(x).sum().backward()
    assert model[0].lora_B.grad is not None
    merge_lora(model)
    torch.testing.assert_close(unload_lora(model, merged="drop")(x), before)


def test_a_base_whose_adapters_cannot_be_placed_keeps_its_embeddings_hooks(monkeypatch):
    """Letting gradients into a Hugging Face model is not undone, so nothing that can fail comes after it."""
    let_in = []
    monkeypatch.setattr(apply, "is_distributed", lambda: True)
    monkeypatch.setattr(apply, "let_gradients_in", let_in.append)
    model = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(model)
    model.module = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
        apply_lora(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert let_in == [] and type(model.module[0]) is nn.Linear
