"""Which children a forward calls together, and which forwards are gated MLPs, read from their source."""

import pytest
from torch import nn
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.t5.modeling_t5 import T5Attention

from lightning_lora.utils.forward_source import calls_together, is_gated_mlp


class Forms(nn.Module):
    def straight(self, x):
        q = self.a(x)
        k = self.b(x).tanh()
        return q + self.c(x) * k

    def another_name_for_self(module, x):
        return module.a(x) + module.b(x)

    def by_position(self, x, /):
        return self.a(x) + self.b(x)

    def of_another_object(self, other, x):
        return other.a(x) + other.b(x) + self.c(x)

    def other_variable(self, x, y):
        return self.a(x) + self.b(y)

    def assigned_in_between(self, x):
        y = self.a(x)
        x = y * 2
        return self.b(x)

    def in_a_branch(self, x):
        y = self.a(x)
        if y.sum() > 0:
            y = y + self.b(x)
        return y + self.c(x)

    def decided(self, x):
        y = self.a(x)
        return y + (self.b(x) if y.any() else self.c(x))

    def twice(self, x):
        return self.a(x) + self.a(x) + self.b(x)

    def in_a_loop(self, x):
        for _ in range(2):
            x = self.a(x) + self.b(x)
        return x

    def more_arguments(self, x):
        return self.a(x, 1) + self.b(x)


TOGETHER = {
    "straight": [["a", "b", "c"]],
    "another_name_for_self": [["a", "b"]],
    "by_position": [["a", "b"]],
    "of_another_object": [],
    "other_variable": [],
    "assigned_in_between": [],
    "in_a_branch": [["a", "c"]],
    "decided": [],
    "twice": [],
    "in_a_loop": [["a", "b"]],
    "more_arguments": [],
}


@pytest.mark.parametrize("form", TOGETHER)
def test_calls_together_are_read_from_the_source(form):
    cls = type("Module", (nn.Module,), {"forward": getattr(Forms, form)})
    assert [sorted(family) for family in calls_together(cls)] == TOGETHER[form]


def test_without_a_source_nothing_is_together():
    names = {}
    exec("def forward(self, x):\n    return self.a(x) + self.b(x)", names)
    assert calls_together(type("Module", (nn.Module,), {"forward": names["forward"]})) == []


def test_real_models():
    assert calls_together(LlamaAttention) == [["q_proj", "k_proj", "v_proj"]]
    assert calls_together(BertSelfAttention) == [["query", "key", "value"]]
    assert calls_together(T5Attention) == []  # keys and values may come from the encoder
    assert is_gated_mlp(LlamaMLP) and not is_gated_mlp(LlamaAttention)
