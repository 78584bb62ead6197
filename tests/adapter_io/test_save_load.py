"""Adapters out of a model and into one: all of it or nothing, whatever goes wrong, even a kill."""

import contextlib
import copy
import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, apply_lora, load_adapter, merge_lora, save_adapter, unload_lora, unmerge_lora
from lightning_lora.adapter_io.files import CONFIG, META, TENSORS, read_adapter
from lightning_lora.layers import lora_layers
from tests.conftest import ALL, ConvNet, Task, TinyModel, adapted, base_bits, same_bits, snapshot
from tests.faults.kit import Crash, crash_at


def merged(model):
    return merge_lora(model)


# There and back.


@pytest.mark.parametrize("wrap_load", [lambda m: m, Task], ids=["plain", "task"])
@pytest.mark.parametrize("wrap_save", [lambda m: m, Task], ids=["plain", "task"])
@pytest.mark.parametrize("save_merged", [False, True])
@pytest.mark.parametrize("into", ["base", "adapted", "merged", "unloaded"])
def test_round_trip(make, ids, tmp_path, wrap_save, wrap_load, save_merged, into):
    model = adapted(make(TinyModel), **ALL)
    expected = model(ids)
    folder = save_adapter((merged if save_merged else lambda m: m)(wrap_save(model)), tmp_path / "deep" / "adapter")
    assert folder == tmp_path / "deep" / "adapter"
    other = make(TinyModel)
    if into != "base":
        adapted(other, seed=9, **ALL)
        other = {"adapted": lambda m: m, "merged": merge_lora, "unloaded": unload_lora}[into](other)
    other = wrap_load(other)
    assert load_adapter(other, str(folder)) is other
    assert same_bits(other(ids), expected)
    assert not any(layer.merged for _, layer in lora_layers(other))
    trained = {name.removeprefix("model.") for name, p in other.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.attn.q_proj": 2}, "alpha_pattern": {r".*1.*q_proj": 5}},
        {"target_modules": r".*(q|v)_proj", "layers": [1], "scaling": "rslora", "dropout": 0.5},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "init": "gaussian"},
    ],
    ids=["patterns", "layers", "bias-lora", "bias-all", "saved", "all-linear"],
)
@pytest.mark.parametrize("save_merged", [False, True])
def test_everything_that_trained_comes_along(make, ids, tmp_path, fields, save_merged):
    model = adapted(make(TinyModel), **fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = model(ids)
    if save_merged:
        merge_lora(model)
    other = load_adapter(make(TinyModel).eval(), save_adapter(model, tmp_path))
    assert same_bits(other(ids), expected)
    assert all(layer.lora_config == LoRAConfig(**fields) for _, layer in lora_layers(other))
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [n for n, p in model.named_parameters() if p.requires_grad]
    # What came back can be saved again and is the same.
    again = read_adapter(save_adapter(other, tmp_path / "again")).tensors
    assert all(same_bits(tensor, again[name]) for name, tensor in read_adapter(tmp_path).tensors.items())


def test_only_what_trained_is_written(make, folder):
    names = set(read_adapter(folder).tensors)
    assert names == {n for n, p in adapted(make(TinyModel), **ALL).named_parameters() if p.requires_grad}


def test_batch_norm_statistics_travel(tmp_path):
    torch.manual_seed(0)
    base = ConvNet()
    model = adapted(copy.deepcopy(base), target_modules=["conv"], rank=2)
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6) * 3 + 1)
    assert model.norm.num_batches_tracked == 3
    x = torch.randn(2, 3, 6, 6)
    expected = model.eval()(x)
    other = load_adapter(copy.deepcopy(base), save_adapter(model, tmp_path)).eval()
    assert same_bits(other(x), expected)
    assert other.norm.num_batches_tracked == 3


def test_a_fresh_classification_head_travels(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification  # not above: a child process below imports this file

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=16, **sizes)).eval()
    model = adapted(copy.deepcopy(base), target_modules=["query"], rank=2)
    with torch.no_grad():
        model.classifier.weight.normal_()
    folder = save_adapter(model, tmp_path)
    with torch.no_grad():
        base.classifier.weight.normal_()  # another fresh head: no part of the base
    ids = torch.tensor([[1, 2]])
    assert same_bits(load_adapter(base, folder)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_fp32_adapters_in_the_file(make, ids, tmp_path, dtype):
    model = adapted(make(TinyModel).to(dtype), **ALL)
    folder = save_adapter(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(folder / TENSORS).values()} == {torch.float32}
    assert same_bits(load_adapter(make(TinyModel).to(dtype), folder)(ids), model(ids))


def test_an_adapter_fits_the_same_base_in_another_dtype(make, folder):
    load_adapter(make(TinyModel).bfloat16(), folder)
    load_adapter(make(TinyModel).double(), folder)


def test_tied_embeddings(make, ids, tmp_path):
    model = adapted(make(TinyModel, tied=True), target_modules=["embed", "lm_head"], rank=2)
    folder = save_adapter(model, tmp_path)
    other = load_adapter(make(TinyModel, tied=True), folder)
    assert other.embed.weight is other.lm_head.weight
    assert same_bits(other(ids), model(ids))
    merge_lora(other, untie=True)
    load_adapter(other, folder)
    assert other.embed.weight is other.lm_head.weight


def test_a_compiled_model_writes_the_same_file(make, tmp_path, ids):
    model = adapted(make(TinyModel), **ALL)
    plain = save_adapter(model, tmp_path / "plain")
    compiled = save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    first, second = read_adapter(plain), read_adapter(compiled)
    assert first.meta() == second.meta() and first.tensors.keys() == second.tensors.keys()
    assert all(same_bits(first.tensors[name], second.tensors[name]) for name in first.tensors)
    other = torch.compile(make(TinyModel), backend="eager")
    load_adapter(other, plain)
    assert same_bits(other._orig_mod(ids), model(ids))


def test_a_checkpoint_loads_as_a_folder_does(make, ids, tmp_path, folder):
    adapter = read_adapter(folder)
    state = {f"model.{name}": tensor for name, tensor in adapter.tensors.items()}
    torch.save({"state_dict": state, META: adapter.meta(root="model")}, tmp_path / "a.ckpt")
    expected = load_adapter(make(TinyModel), folder)(ids)
    assert same_bits(load_adapter(make(TinyModel), tmp_path / "a.ckpt")(ids), expected)
    assert same_bits(load_adapter(Task(make(TinyModel)), tmp_path / "a.ckpt")(ids), expected)


def test_loading_a_second_adapter_replaces_the_first(make, ids, tmp_path):
    first, second = (adapted(make(TinyModel), seed=seed, **ALL) for seed in (1, 2))
    folders = [save_adapter(m, tmp_path / str(i)) for i, m in enumerate((first, second))]
    model = make(TinyModel)
    for index in (0, 1, 0):
        load_adapter(model, folders[index])
        assert same_bits(model(ids), (first, second)[index](ids))
        merge_lora(model)


# Refusals to save.


def test_a_model_without_lora_is_not_saved(make, tmp_path):
    with pytest.raises(ValueError, match="TinyModel has no LoRA layers to save; call apply_lora"):
        save_adapter(make(TinyModel), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_not_empty_needs_overwrite(make, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = adapted(make(TinyModel), **ALL)
    with pytest.raises(ValueError, match="is not empty; choose another or pass overwrite=True"):
        save_adapter(model, tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    save_adapter(model, tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS, "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder(make, tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="is a file; choose another"):
        save_adapter(adapted(make(TinyModel), **ALL), tmp_path / "a", overwrite=True)


def test_saving_changes_nothing(make, tmp_path):
    model = merge_lora(adapted(make(TinyModel), **ALL))
    before = snapshot(model)
    save_adapter(model, tmp_path)
    assert snapshot(model) == before


# Crashes. Kills: tests/harness.


@pytest.mark.parametrize("error", [Crash(), OSError(errno.ENOSPC, "No space left on device")], ids=["crash", "full-disk"])
@pytest.mark.parametrize("first", [True, False])
def test_a_save_that_fails_anywhere_leaves_the_old_or_the_new_adapter_and_nothing_else(make, ids, tmp_path, first, error):
    """At each call that changes the disk."""
    models = [adapted(make(TinyModel), seed=rank, target_modules=["q_proj"], rank=rank) for rank in (2, 4)]
    outputs = [model(ids) for model in models]
    for step in range(1, 30):
        folder = tmp_path / str(step) / "adapter"
        if not first:
            save_adapter(models[0], folder)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(type(error)):
            count = crash_at(patch, step, error)
            save_adapter(models[1], folder, overwrite=True)
        if folder.exists() or not first:
            result = load_adapter(make(TinyModel), folder)(ids)
            assert same_bits(result, outputs[1]) or (not first and count[0] >= step and same_bits(result, outputs[0]))
        save_adapter(models[1], folder, overwrite=True)
        assert same_bits(load_adapter(make(TinyModel), folder)(ids), outputs[1])
        assert sorted(os.listdir(folder)) == [CONFIG, TENSORS] and os.listdir(folder.parent) == ["adapter"]
        if count[0] < step:
            break
    assert 6 < step < 29


# What a loaded model is.


def test_loading_keeps_unmerge_exact(make, folder):
    model = make(TinyModel)
    base = base_bits(model)
    unload_lora(unmerge_lora(merge_lora(load_adapter(model, folder))))
    assert base_bits(model) == base


def test_loading_applies_lora_as_apply_lora_does(make, folder):
    loaded, applied = load_adapter(make(TinyModel), folder), apply_lora(make(TinyModel), config=LoRAConfig(**ALL))
    assert [(n, type(m)) for n, m in loaded.named_modules()] == [(n, type(m)) for n, m in applied.named_modules()]
    assert [(n, p.dtype, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.dtype, p.requires_grad) for n, p in applied.named_parameters()
    ]
    assert apply_lora(loaded, config=LoRAConfig(**ALL)) is loaded


@pytest.mark.parametrize("state", ["base", "adapted", "only the head"])
@pytest.mark.parametrize("peft", [False, True])
def test_a_model_on_the_meta_device_is_refused(make, tmp_path, peft, state):
    """Its parameters would swallow the values without a word; once it has its own, the adapter loads."""
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = adapted(make(TinyModel), **fields)
    folder = save_adapter(model, tmp_path / "adapter")
    if peft:
        save_file(load_file(folder / TENSORS), folder / TENSORS)
    other = make(TinyModel)
    if state == "only the head":
        other.lm_head.to("meta")
    else:
        other.to("meta")
    if state == "adapted":
        apply_lora(other, config=LoRAConfig(**fields))
        with pytest.raises(ValueError, match=r"new: 'layers\.0\S+' .* is on the meta device, and no values to save"):
            save_adapter(other, tmp_path / "new")
        with pytest.raises(ValueError, match=r"cannot be merged: it is on the meta device"):
            merge_lora(other)
        assert not (tmp_path / "new").exists()
    before = [(type(module), name) for name, module in other.named_modules()]
    for options in ({}, {"check_base": False}):
        with pytest.raises(ValueError, match=r"is on the meta device, and the adapter's values would be lost there: give the model its"):
            load_adapter(other, folder, **options)
    assert [(type(module), name) for name, module in other.named_modules()] == before
    unload_lora(other)
    other.to_empty(device="cpu").load_state_dict(make(TinyModel).state_dict())
    load_adapter(other, folder)
    assert same_bits(other.layers[0].attn.q_proj.lora_B, model.layers[0].attn.q_proj.lora_B)
    assert same_bits(other.lm_head.weight, model.lm_head.weight)
