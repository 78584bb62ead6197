"""VeRA beyond what `make family` checks: one A and B for all layers, drawn once, in no file; and what its formula has no place for."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    get_lora_parameters,
    load_adapter,
    lora_param_groups,
    merge_lora,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.layers import lora_layers
from tests.conftest import ConvNet, TinyModel, base_bits, fill, same_bits, snapshot
from tests.lit import LitNet, bits, make_net, trainer

VERA = LoRAConfig(rank=4, target_modules=["fc1", "fc2"], variant="vera", variant_options={"projection_seed": 3})
X = torch.linspace(-1, 1, 40).view(5, 8)


def adapted(config=VERA):
    return fill(apply_lora(make_net(), config)).eval()


def storages(model):
    return {layer.lora_A.untyped_storage().data_ptr() for _, layer in lora_layers(model)}


def test_layers_of_all_shapes_share_one_a_and_b():
    model = adapted()
    generator = torch.Generator().manual_seed(3)
    A, B = torch.empty(4, 32), torch.empty(32, 4)  # the widest input and output
    nn.init.kaiming_uniform_(A, generator=generator)
    nn.init.kaiming_uniform_(B, generator=generator)
    for layer in (model.fc1, model.fc2):
        wide, tall = layer.in_features, layer.out_features
        torch.testing.assert_close(layer.lora_A, A[:, :wide], rtol=0, atol=1e-7)
        torch.testing.assert_close(layer.lora_B, B[:tall], rtol=0, atol=1e-7)
    assert len(storages(model)) == 1


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: model.double().float(), lambda model: model.bfloat16()],
    ids=["copied", "pickled", "cast", "bf16"],
)
def test_what_happens_to_the_model_leaves_it_shared_and_the_same(again):
    model = adapted()
    A, B = model.fc1.lora_A.clone(), model.fc1.lora_B.clone()
    other = again(model)
    assert len(storages(other)) == 1
    assert torch.equal(other.fc1.lora_A, A) and torch.equal(other.fc1.lora_B, B)
    assert {p.dtype for p in get_lora_parameters(other)} == {torch.float32}


def test_only_the_vectors_are_parameters_each_once():
    model = adapted()
    parameters = get_lora_parameters(model)
    assert [tuple(p.shape) for p in parameters] == [(4,), (32,), (4,), (4,)]
    assert len({id(p) for p in parameters}) == len(parameters) and all(p.requires_grad for p in parameters)
    torch.optim.AdamW(parameters)
    assert [group["name"] for group in lora_param_groups(model, lr=1e-3, weight_decay=0.1)] == ["lora_B_no_decay", "no_decay"]
    assert not any("projection" in name or "lora_A" in name for name in [*model.state_dict(), *dict(model.named_buffers())])


def test_it_starts_as_the_options_say():
    model = apply_lora(make_net(), LoRAConfig(**{**VERA.to_dict(), "variant_options": {"d_initial": 0.5}}))
    assert model.fc1.lora_lambda_d.eq(0.5).all() and model.fc1.lora_lambda_b.eq(0).all()
    assert torch.equal(model.eval()(X), make_net().eval()(X))


def test_on_the_meta_device_and_off_it():
    with torch.device("meta"):
        model = apply_lora(make_net(), VERA)
    model.to_empty(device="cpu")
    for _, layer in lora_layers(model):
        layer.reset_parameters()
    assert torch.equal(model.fc1.lora_A, adapted().fc1.lora_A) and model.fc1.lora_lambda_d.eq(0.1).all()


def test_merge_unmerge_unload():
    model = adapted()
    expected, base = model(X), base_bits(model)
    merge_lora(model)
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    assert unmerge_lora(model)(X).equal(expected)
    unload_lora(model)
    assert base_bits(model) == base and type(model.fc1) is nn.Linear and not any("lora" in name for name in model.fc1.__dict__)


def test_a_folder_holds_the_vectors_alone(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for name, tensor in tensors.items() if ".norm." not in name) == 4 + 32 + 4 + 4
    read = load_adapter(make_net(), tmp_path / "adapter").eval()
    assert torch.equal(read(X), model(X)) and read.fc1.lora_config == VERA
    other = apply_lora(make_net(), LoRAConfig(**{**VERA.to_dict(), "variant_options": {}}))
    with pytest.raises(ValueError, match=r"does not fit the LoRA this model has.*projection_seed"):
        load_adapter(other, tmp_path / "adapter")


def test_a_checkpoint_holds_the_vectors_alone_and_resumes_exactly(tmp_path):
    def run(epochs, ckpt=None):
        module = LitNet()
        lit = trainer(tmp_path, LoRACallback(VERA, merge_on_fit_end=False), max_epochs=epochs)
        lit.fit(module, ckpt_path=ckpt)
        return lit, module

    lit, _ = run(1)
    lit.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    vectors = {f"net.{layer}.lora_lambda_{part}" for layer in ("fc1", "fc2") for part in "db"}
    assert {name for name in state if "lora" in name or "fc" in name} == vectors
    _, resumed = run(2, tmp_path / "one.ckpt")
    _, straight = run(2)
    assert all(torch.equal(tensor, bits(straight)[name]) for name, tensor in bits(resumed).items())


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (TinyModel, {"alpha": 8.0}, r"alpha=8 and variant='vera', whose formula has no scaling; leave alpha out"),
        (TinyModel, {"scaling": "rslora"}, r"scaling='rslora' and variant='vera'"),
        (TinyModel, {"init": "gaussian"}, r"init='gaussian' and variant='vera'"),
        (TinyModel, {"rank_pattern": {"v_proj": 2}}, r"one A and B of rank=8 for all layers; leave rank_pattern out"),
        (ConvNet, {"target_modules": ["conv"]}, r"'conv' .*: variant='vera' shares its A and B among linear layers only; exclude it"),
        (TinyModel, {"variant_options": {"seed": 1}}, r"variant_options\['seed'\]=1 is not known.*; it takes d_initial, projection_seed"),
        (TinyModel, {"variant_options": {"projection_seed": -1}}, r"variant_options\['projection_seed'\]=-1: give a whole number ≥ 0"),
        (TinyModel, {"variant_options": {"d_initial": "x"}}, r"variant_options\['d_initial'\]='x': give a finite number such as 0\.1"),
        (TinyModel, {"variant_options": {"d_initial": 10**400}}, r"give a finite number such as 0\.1"),
        (TinyModel, {"variant_options": {"projection_seed": 2**63}}, r"give a whole number ≥ 0, below"),
    ],
)
def test_what_it_has_no_place_for_is_refused_and_changes_nothing(make, model, fields, message):
    net = make(model)
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        apply_lora(net, LoRAConfig(variant="vera", **fields))
    assert snapshot(net) == before


def test_a_file_of_another_projection_is_refused(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(config.read_text())
    assert (fields["peft_type"], fields["projection_prng_key"], fields["save_projection"]) == ("VERA", 3, False)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file({**tensors, "base_model.vera_A": torch.zeros(4, 32)}, tmp_path / "adapter" / "adapter_model.safetensors")
    net = make_net()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"vera_A \(4, 32\) is not what projection_seed=3 gives here, \(4, 32\)"):
        load_adapter(net, tmp_path / "adapter")
    assert snapshot(net) == before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_trains_after_a_first_evaluation(mode):
    """The first forward pass draws A and B and keeps them."""
    model = adapted()
    model.fc1.lora_projection._drawn.clear()
    with mode():
        before = model(X)
    after = model(X)
    assert same_bits(after, before)
    after.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
