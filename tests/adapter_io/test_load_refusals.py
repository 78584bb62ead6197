"""Refusals to load: the model is as it was, to the bit."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import load_adapter, merge_lora, save_adapter
from lightning_lora.adapter_io.files import CONFIG, TENSORS, read_adapter
from tests.conftest import ALL, TinyModel, adapted, same_bits, snapshot


def change_tensors(folder, change):
    with safe_open(folder / TENSORS, "pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata)


FIRST = "base_model.model.embed.lora_embedding_A"
LAST = "base_model.model.layers.1.mlp.lora_B.weight"
DAMAGES = {
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(LAST)), r"1 tensor is missing .*: layers\.1\.mlp\.lora_B"),
    "left-over": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.layers.7.mlp.lora_A.weight": torch.ones(4, 8)})),
        r"'layers\.7\.mlp\.lora_A' is no tensor that its config puts on this model",
    ),
    "other-base-tensor": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(11, 8)})),
        r"'lm_head\.weight' is a base weight that differs from this model's",
    ),
    "shape": (lambda f: change_tensors(f, lambda t: t.update({LAST: torch.ones(8, 5)})), r"layers\.1\.mlp\.lora_B has shape \(8, 5\)"),
    "nan": (
        lambda f: change_tensors(f, lambda t: t[LAST].fill_(torch.nan)),
        r"1\.mlp\.lora_B holds NaN or infinity \(1 tensor does\)",
    ),
    "inf": (lambda f: change_tensors(f, lambda t: t[FIRST].fill_(torch.inf)), r"embed\.lora_A holds NaN or infinity"),
    "truncated": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1]), "not a readable safetensors file"),
    "no-tensors": (lambda f: (f / TENSORS).unlink(), "is missing"),
    "json": (lambda f: (f / CONFIG).write_text("{"), "is not valid JSON"),
    "mixed": (lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "r": 2}'), "files of two different saves"),
}
STATES = {"base": lambda m: m, "adapted": lambda m: adapted(m, seed=9, **ALL), "merged": lambda m: merge_lora(adapted(m, seed=9, **ALL))}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_refused_file_leaves_the_model_alone(make, folder, damage, state):
    model = STATES[state](make(TinyModel))
    change, message = DAMAGES[damage]
    change(folder)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, folder)
    assert str(folder) in str(error.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("state", STATES)
def test_another_base_is_refused_unless_told_otherwise(make, ids, folder, state):
    torch.manual_seed(99)
    model = STATES[state](TinyModel())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"was trained on another base: fingerprint [0-9a-f]{32} \(TinyModel ''\).* pass check_base=False"):
        load_adapter(model, folder)
    assert snapshot(model) == before
    load_adapter(model, folder, check_base=False)
    assert same_bits(model.embed.lora_A, read_adapter(folder).tensors["embed.lora_A"])


@pytest.mark.parametrize("state", STATES)
def test_a_smaller_base_is_refused(folder, state):
    model = TinyModel()
    del model.layers[1]
    model = STATES[state](model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1"):
        load_adapter(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rank": 2}, "embed"),
        ({"alpha": 3.0}, "embed"),
        ({"scaling": "rslora"}, "embed"),
        ({"target_modules": ["q_proj"]}, "embed"),
        ({"target_modules": ["q_proj", "v_proj", "mlp", "embed", "lm_head"]}, "lm_head"),
        ({"rank_pattern": {"layers.1.mlp": 2}}, r"layers\.1\.mlp"),
    ],
)
def test_an_adapter_of_another_shape_than_the_models_is_refused(make, folder, fields, name, merge):
    model = adapted(make(TinyModel), **(ALL | fields))
    if merge:
        merge_lora(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"does not fit the LoRA this model has.*'{name}' has .*; call unload_lora\(model\) first"):
        load_adapter(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}], ids=lambda f: next(iter(f)))
def test_an_adapter_that_trained_more_than_the_model_does_is_refused(make, tmp_path, fields):
    """Its biases or heads would land in frozen parameters, and a later save would leave them out."""
    folder = save_adapter(adapted(make(TinyModel), **ALL, **fields), tmp_path)
    model = adapted(make(TinyModel), **ALL)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"call unload_lora\(model\) first"):
        load_adapter(model, folder)
    assert snapshot(model) == before


def test_training_settings_may_differ(make, ids, tmp_path):
    """Dropout and init change nothing once the adapter is trained."""
    source = adapted(make(TinyModel), **ALL, dropout=0.5, init="gaussian").eval()
    model = load_adapter(adapted(make(TinyModel), seed=9, **ALL).eval(), save_adapter(source, tmp_path))
    assert same_bits(model(ids), source(ids))


def test_a_merge_without_a_way_back_is_refused(make, folder):
    model = merge_lora(adapted(make(TinyModel), **ALL), reversible=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'embed' cannot be unmerged: no undo record was kept"):
        load_adapter(model, folder)
    assert snapshot(model) == before


def test_a_merged_model_whose_adapter_changed_stays_merged(make, folder):
    model = merge_lora(adapted(make(TinyModel), **ALL))
    with torch.no_grad():
        model.layers[1].mlp.lora_A[0, 0] += 1
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers\.1\.mlp' cannot be unmerged"):
        load_adapter(model, folder)
    assert snapshot(model) == before


def test_nan_on_request(make, tmp_path):
    broken = adapted(make(TinyModel), **ALL)
    nn.init.constant_(broken.layers[1].mlp.lora_B, torch.nan)
    folder = save_adapter(broken, tmp_path / "adapter")
    model = load_adapter(make(TinyModel), folder, allow_nonfinite=True)
    assert model.layers[1].mlp.lora_B.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_tensors_of_another_dtype_have_their_values(make, folder, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    found = load_adapter(make(TinyModel), folder).layers[1].mlp.lora_A
    assert found.dtype == torch.float32 and found.equal(tensors["base_model.model.layers.1.mlp.lora_A.weight"].float())


def test_pefts_copies_of_frozen_base_weights_are_accepted_as_long_as_they_are_the_bases(make, folder):
    copy = {"base_model.model.lm_head.weight": make(TinyModel).lm_head.weight.detach().clone()}
    save_file(load_file(folder / TENSORS) | copy, folder / TENSORS, {"format": "pt"})  # PEFT's files have no other metadata
    load_adapter(make(TinyModel), folder)


def test_grouped_convolutions_round_trip_and_refuse_mixed_groups(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))

    model, x = adapted(net(), target_modules=["0"], rank=2), torch.randn(1, 4, 5, 5)
    folder, other = save_adapter(model, tmp_path), net()
    assert same_bits(load_adapter(other, folder)(x), model(x))
    name = "base_model.model.0.lora_A.weight"
    change_tensors(folder, lambda t: t[name].fill_(1.0))
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"0\.lora_A: .* mixes the groups"):
        load_adapter(other, folder)
    assert snapshot(other) == before
