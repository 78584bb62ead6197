"""A model that lacks one of transformers' conventions is like any other model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers
from torch import nn
from transformers import LlamaForCausalLM

from lightning_lora.utils import transformers_conventions as conventions
from tests import tiny_lm


class Narrow(LlamaForCausalLM):
    """Its file has the function for masks, its forward takes none: what only looks at the file is wrong about it."""

    def forward(self, input_ids):  # type: ignore[no-untyped-def]
        return super().forward(input_ids)


Narrow.__module__ = LlamaForCausalLM.__module__


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_what_hugging_face_models_say() -> None:
    model = tiny_lm.llama()
    assert conventions.block_classes(model) == ["LlamaDecoderLayer"]
    assert conventions.tensor_parallel_plan(model.model)["layers.*.self_attn.q_proj"] == "colwise"
    assert conventions.keeps_masked_logits(model) and not conventions.keeps_masked_logits(tiny_lm.llama(cls=Narrow))
    assert conventions.model_name(transformers.LlamaConfig()) == "llama"
    assert not conventions.gives_gradients(model)
    model.enable_input_require_grads()
    assert conventions.gives_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert any(options.get("use_reentrant") for options in conventions.checkpoint_options(model))


def test_ties_that_are_declared_for_one_instance() -> None:
    model = tiny_lm.llama()
    model.config.tie_word_embeddings = True
    assert conventions.is_transformers_model(model) and conventions.is_transformers_model(model.model)
    assert [(prefix, ties) for prefix, _, ties in conventions.declared_ties(nn.Sequential(model))] == [
        ("0.", {"lm_head.weight": "model.embed_tokens.weight"})
    ]
    assert conventions.declare_ties(model, {}) is None and not list(conventions.declared_ties(model))
    assert conventions.declare_ties(model, None) == {} and len(list(conventions.declared_ties(model))) == 1


def test_what_is_forgotten_before_saving() -> None:
    model = tiny_lm.llama()
    model.hf_device_map, model.hf_quantizer = {"": "cpu"}, SimpleNamespace(quantization_config=SimpleNamespace(quant_method="torchao"))
    model.config.quantization_config, model.config.distributed_config = {}, object()
    model._weight_conversions = [Conversion(True), Conversion(False)]
    assert conventions.quantizing_library(model) == "torchao"
    conventions.forget_placement(model)
    conventions.forget_quantizer(model)
    assert conventions.quantizing_library(model) is None
    assert not {"hf_device_map", "hf_quantizer"} & model.__dict__.keys()
    assert not {"quantization_config", "distributed_config"} & model.config.__dict__.keys()
    assert [each.reversible for each in model._weight_conversions] == [True]


class Conversion:
    def __init__(self, reversible: bool) -> None:
        self.reversible = reversible

    def reverse_transform(self) -> None:
        if not self.reversible:
            raise NotImplementedError


def test_others_say_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert conventions.block_classes(model) == [] and conventions.tensor_parallel_plan(model) == {}
    assert not conventions.keeps_masked_logits(model) and not conventions.gives_gradients(model)
    assert not conventions.is_transformers_model(model) and not list(conventions.declared_ties(model))
    conventions.forget_placement(model)
    conventions.forget_quantizer(model)
    assert conventions.quantizing_library(model) is None
    assert conventions.model_name(None) == "" and list(conventions.checkpoint_options(model)) == [{}, {}]
