"""A model that lacks one of transformers' conventions is like any other model."""

from __future__ import annotations

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


def test_others_say_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert conventions.block_classes(model) == [] and conventions.tensor_parallel_plan(model) == {}
    assert not conventions.keeps_masked_logits(model) and not conventions.gives_gradients(model)
    assert conventions.model_name(None) == "" and list(conventions.checkpoint_options(model)) == [{}, {}]
