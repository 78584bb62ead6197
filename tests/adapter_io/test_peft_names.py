"""Names of tensors in PEFT's files, without PEFT: its own, those that other tools leave, and those that transformers renamed."""

import pytest
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lightning_lora.adapter_io.peft_names import names_for_peft, names_here, our_name, our_names, peft_name, rebuilt
from lightning_lora.utils.names import modules_by_name
from tests.conftest import TinyModel
from tests.sweep.archs import build


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.q.lora_A.weight", "a.q.lora_A"),
        ("a.q.lora_B.weight", "a.q.lora_B"),
        ("e.lora_embedding_A", "e.lora_A"),
        ("a.q.base_layer.bias", "a.q.bias"),
        ("head.modules_to_save.weight", "head.weight"),
        ("head.weight", "head.weight"),
        ("a.q.lora_A.default.weight", "a.q.lora_A"),
        ("e.lora_embedding_B.default", "e.lora_B"),
        ("a.q.lora_magnitude_vector", "a.q.lora_magnitude_vector"),
        ("a.q.lora_magnitude_vector.weight", "a.q.lora_magnitude_vector"),
        ("a.q.lora_magnitude_vector.default.weight", "a.q.lora_magnitude_vector"),
        ("a.q.vera_lambda_d", "a.q.lora_lambda_d"),
        ("head.modules_to_save.default.dense.weight", "head.dense.weight"),
        ("head.modules_to_save.dense.weight", "head.dense.weight"),
        ("_orig_mod.a._fsdp_wrapped_module.q.lora_A.weight", "a.q.lora_A"),
    ],
)
def test_tensor_names(name, expected):
    assert our_name(f"base_model.model.{name}", "f") == expected
    assert our_name(f"module.base_model.model.{name}", "f") == expected


def test_a_tensor_that_peft_would_not_name_so():
    with pytest.raises(ValueError, match=r"f: tensor 'a.lora_A' does not start with 'base_model.model.'"):
        our_name("a.lora_A", "f")


def test_an_adapters_name_is_told_from_the_factors():
    names = ("q.lora_A.mine.weight", "head.modules_to_save.mine.weight", "head.original_module.weight")
    found = our_names([f"base_model.model.{name}" for name in names], "f")
    assert list(found.values()) == ["q.lora_A", "head.weight"]


def test_several_adapters_in_one_file():
    with pytest.raises(ValueError, match=r"f holds several adapters \(one, two\); save one of them alone"):
        our_names([f"base_model.model.q.lora_A.{name}.weight" for name in ("one", "two")], "f")
    with pytest.raises(ValueError, match="several adapters"):
        our_names([f"base_model.model.{name}.lora_A.{name}.weight" for name in ("one", "two")], "f")
    with pytest.raises(ValueError, match=r"several adapters \(one\)"):
        our_names(["base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.one.weight"], "f")


def test_base_tensors_of_adapted_layers_stand_one_deeper_in_peft():
    assert peft_name("a.q.bias", {"a.q"}) == "a.q.base_layer.bias"
    assert peft_name("a.norm.bias", {"a.q"}) == "a.norm.bias"


@pytest.fixture(scope="module")
def llava():
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1}))


def test_names_from_before_transformers_4_52(llava):
    old = "language_model.model.layers.0.self_attn.q_proj"
    new = "model.language_model.layers.0.self_attn.q_proj"
    modules = modules_by_name(llava)
    assert names_here(llava, [old, new, "unknown"], modules) == {old: new}
    assert names_here(llava, ["language_model.lm_head"], modules) == {"language_model.lm_head": "lm_head"}


def test_a_model_that_is_not_of_transformers_has_no_other_names(make):
    assert names_here(make(TinyModel), ["old"], {"new"}) == {}
    assert rebuilt(make(TinyModel), "old") is None
    assert names_for_peft(make(TinyModel), ["layers.0.mlp"]) == {"layers.0.mlp": "layers.0.mlp"}


def test_an_expert_that_is_part_of_a_tensor_now():
    assert rebuilt(build("mixtral")[0], "model.layers.0.block_sparse_moe.experts.1.w2") == "part of 'model.layers.0.mlp.experts.down_proj'"


def test_a_name_that_peft_would_change_is_written_as_the_checkpoint_has_it():
    name = "model.layers.1.mlp.shared_experts.gate_proj"
    assert names_for_peft(build("laguna")[0], [name]) == {name: "model.layers.1.mlp.shared_expert.gate_proj"}


def test_a_name_that_peft_finds_under_no_name(monkeypatch):
    class Doubling:
        def rename_source_key(self, name):
            return name.replace("q", "qq"), None

        def reverse_transform(self):
            return self

    monkeypatch.setattr("lightning_lora.adapter_io.peft_names.is_converted", lambda model: True)
    monkeypatch.setattr("lightning_lora.adapter_io.peft_names.checkpoint_conversions", lambda model: [Doubling()])
    assert names_for_peft(nn.Linear(1, 1), ["q", "v"]) == {"q": None, "v": "v"}
