"""AdaLoRA on every kind: its start, what it refuses, and shrinking to a plain LoRA that computes the same (formula: tests/family.py)."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_adapter, merge_lora, save_adapter, shrink_adalora, unmerge_lora
from lightning_lora.layers import lora_layers
from lightning_lora.layers.adapting import refusal
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model.apply import already_applied
from lightning_lora.variants.adalora import AdaLoRA
from tests.conftest import Task, TinyModel, fill, same_bits, snapshot
from tests.layers.kinds import CASES
from tests.parity.models import llama

REFUSED = {"conv2d-groups": "split into groups", "conv2d-reflect": "split into groups", "embedding-padding": "padding_idx=2"}
KINDS = [kind for kind in CASES if kind not in REFUSED]
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, filled=True):
    return CASES[kind].layer(filled=filled, variant="adalora")


@every_kind
def test_starts_as_the_base(kind):
    layer, x = build(kind, filled=False), CASES[kind].x()
    assert same_bits(layer(x), CASES[kind].base()(x))
    assert all(factor.std().item() == pytest.approx(0.02, rel=0.5) for factor in (layer.lora_A, layer.lora_B))
    assert layer.lora_E.shape == (4, 1) and not layer.lora_E.any()
    layer(x).sum().backward()
    assert layer.lora_E.grad.abs().max() > 0  # so that it can leave zero


@every_kind
def test_pickles(kind):
    layer, x = build(kind), CASES[kind].x()
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer) and isinstance(again, AdaLoRA)
    assert same_bits(again(x), layer(x))


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind):
    assert refusal(CASES[kind].base(), LayerSpec(LoRAConfig(dropout=0.0), 4, 16.0, "blocks.0.layer")) is None
    message = refusal(CASES[kind].base(), LayerSpec(LoRAConfig(variant="adalora"), 4, 16.0, "blocks.0.layer"))
    assert "'blocks.0.layer'" in message and REFUSED[kind] in message and "exclude it" in message
    model = nn.Sequential(CASES[kind].base(), nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.raises(ValueError, match=REFUSED[kind]):
        apply_lora(model, LoRAConfig(rank=4, target_modules=["0", "1"], variant="adalora"))
    assert snapshot(model) == before


def test_another_start_is_refused():
    model = TinyModel()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"init='gaussian' and variant='adalora'.*leave init out"):
        apply_lora(model, LoRAConfig(init="gaussian", variant="adalora"))
    assert snapshot(model) == before


# Shrinking.


def pruned(kind):
    layer = build(kind)
    with torch.no_grad():
        layer.lora_E[[0, 2]] = 0
    return layer


@every_kind
def test_shrinks_to_the_plain_layer_that_computes_the_same(kind):
    layer, x = pruned(kind), CASES[kind].x()
    expected = layer(x)
    gradient = torch.autograd.grad(expected.square().sum(), layer.lora_B)[0]
    model = nn.Sequential(layer)
    assert shrink_adalora(model) == {"0": 2}
    assert type(layer) is type(CASES[kind].layer()) and layer.rank == 2 and list(layer.lora_parameters()) == ["lora_A", "lora_B"]
    assert layer.lora_config.rank_pattern == {"0": 2} and layer.lora_config.variant == "plain"
    assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == 2 and layer.lora_A.requires_grad and not layer.weight.requires_grad
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert gradient[:, 0].eq(0).all()  # a pruned triplet was out of it already


def tiny(seed=3, **fields):
    """A model with every rank from 0 to 4, and a trained bias; what it has left by name."""
    config = LoRAConfig(rank=4, alpha=6, target_modules=["q_proj", "v_proj", "mlp"], bias="lora_only", variant="adalora", **fields)
    model = fill(apply_lora(TinyModel(), config), seed)
    ranks = {}
    with torch.no_grad():
        for index, (name, layer) in enumerate(lora_layers(model)):
            layer.lora_E[index % 5 :] = 0
            ranks[name] = index % 5
    return model.eval(), ranks


IDS = torch.arange(11)[None]


def test_a_whole_model_shrinks():
    model, ranks = tiny()
    flags = {name: p.requires_grad for name, p in model.named_parameters() if "lora_" not in name}
    expected, state = model(IDS), torch.get_rng_state()
    assert shrink_adalora(model) == ranks and 0 in ranks.values()
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    layers = dict(lora_layers(model))
    assert {name: layer.rank for name, layer in layers.items()} == {name: max(rank, 1) for name, rank in ranks.items()}
    config = layers["layers.0.mlp"].lora_config
    assert config.rank == 4 and all(layer.lora_config == config for layer in layers.values())
    assert apply_lora(model, config) is model  # the config says exactly what is there
    assert {name: p.requires_grad for name, p in model.named_parameters() if "lora_" not in name} == flags
    assert torch.equal(torch.get_rng_state(), state)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    with pytest.raises(ValueError, match="has no AdaLoRA layers to shrink"):
        shrink_adalora(model)


def test_names_are_those_of_the_model_inside_a_lightning_module():
    model, ranks = tiny()
    task = Task(model)
    assert shrink_adalora(task) == {f"model.{name}": rank for name, rank in ranks.items()}
    config = model.layers[0].mlp.lora_config
    assert config.rank_pattern.keys() == ranks.keys()
    assert apply_lora(task, config) is task and apply_lora(model, config) is model


def test_a_name_that_ends_another_keeps_its_own_rank():
    inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    model = apply_lora(nn.ModuleDict({"fc": nn.Linear(4, 4), "block": inner}), LoRAConfig(rank=3, target_modules=["fc"], variant="adalora"))
    fill(model)
    model["fc"].lora_E.data[0] = 0
    assert shrink_adalora(model) == {"fc": 2, "block.fc": 3}
    assert apply_lora(model, model["fc"].lora_config) is model


@pytest.mark.parametrize("when", ["as trained", "shrunk", "merged"])
def test_files_hold_the_plain_lora(when, tmp_path):
    model, ranks = tiny()
    expected = model(IDS)
    if when == "shrunk":
        shrink_adalora(model)
    elif when == "merged":
        merge_lora(model)
    before = snapshot(model)
    save_adapter(model, tmp_path / "adapter")
    assert snapshot(model) == before  # saving is no shrinking
    torch.manual_seed(0)
    fresh = TinyModel()
    fresh.load_state_dict({name: p for name, p in unmerge_lora(model).state_dict().items() if "lora_" not in name}, strict=True)
    fresh = load_adapter(fresh, tmp_path / "adapter", check_base=False).eval()
    assert {name: layer.rank for name, layer in lora_layers(fresh)} == {name: max(rank, 1) for name, rank in ranks.items()}
    torch.testing.assert_close(fresh(IDS), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_shrink_is_left_alone():
    model, _ = tiny()
    merge_lora(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers\.0\.attn\.q_proj' is merged.*unmerge_lora"):
        shrink_adalora(model)
    assert snapshot(model) == before


def test_rows_that_train_keep_their_values_and_say_nothing_of_the_config(tmp_path):
    torch.manual_seed(0)
    plain, ids = llama(tie_word_embeddings=True).double().eval(), torch.tensor([[5, 3, 9]])
    config = LoRAConfig(rank=2, variant="adalora", target_modules=["q_proj"], trainable_token_indices=[3, 5])
    model = apply_lora(copy.deepcopy(plain), config)
    with torch.no_grad():
        for parameter in get_lora_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    wanted = model(ids).logits
    shrink_adalora(model)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-10)
    assert already_applied(model, model.model.layers[0].self_attn.q_proj.lora_config)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(model, tmp_path)(ids).logits, wanted, rtol=0, atol=1e-6)
